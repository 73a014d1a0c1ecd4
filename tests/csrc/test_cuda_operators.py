"""The CUDA operators as functions of memory (csrc/native.h), which the library exports beside torch's operators."""

import ctypes
import os

import pytest
import torch
from cases import CASES

from fastmeta import _extension

pytestmark = pytest.mark.skipif(not _extension.EMULATED, reason="the emulated CUDA kernels are not loaded")


class DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("dtype", ctypes.c_uint8 * 4),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


Run = ctypes.CFUNCTYPE(
    ctypes.c_bool,
    ctypes.POINTER(ctypes.POINTER(DLTensor)),
    ctypes.POINTER(ctypes.c_double),
    ctypes.POINTER(ctypes.POINTER(DLTensor)),
    ctypes.c_void_p,
)


class NativeOperator(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("device", ctypes.c_char_p),
        ("num_tensors", ctypes.c_int),
        ("num_numbers", ctypes.c_int),
        ("num_outputs", ctypes.c_int),
        ("run", Run),
    )


@pytest.fixture(scope="module")
def operators():
    library = ctypes.CDLL(os.environ["FASTMETA_CUDA_EMULATION"])
    library.fastmeta_cuda_operators.restype = ctypes.POINTER(NativeOperator)
    count = ctypes.c_int()
    found = library.fastmeta_cuda_operators(ctypes.byref(count))
    return {found[i].name.decode(): found[i] for i in range(count.value)}


def described(tensor):
    code = (2, tensor.element_size() * 8, 1, 0) if tensor.is_floating_point() else (0, tensor.element_size() * 8, 1, 0)
    longs = ctypes.c_int64 * tensor.dim()
    return DLTensor(tensor.data_ptr(), (1, 0), tensor.dim(), code, longs(*tensor.shape), longs(*tensor.stride()), 0)


def pointers(tensors):
    return (ctypes.POINTER(DLTensor) * len(tensors))(
        *(None if tensor is None else ctypes.pointer(described(tensor)) for tensor in tensors)
    )


def call(operator, tensors, numbers, out):
    assert (len(tensors), len(numbers), len(out)) == (
        operator.num_tensors,
        operator.num_numbers,
        operator.num_outputs,
    )
    return operator.run(pointers(tensors), (ctypes.c_double * len(numbers))(*numbers), pointers(out), None)


def test_arguments_are_those_of_the_schemas(operators):
    assert len(operators) == 5
    for name, operator in operators.items():
        schema = getattr(torch.ops.fastmeta, name).default._schema
        tensors = [a for a in schema.arguments if "Tensor" in str(a.type)]
        assert schema.arguments[: len(tensors)] == tensors
        assert operator.device == b"cuda"
        assert operator.num_tensors == len(tensors)
        assert operator.num_numbers == len(schema.arguments) - len(tensors)
        assert operator.num_outputs == len(schema.returns)


def test_results_are_those_of_the_operators(operators, generator):
    n, d, c = 20, 12, 5
    h, f, w = torch.randn(n, d, generator=generator), torch.randn(n, c, generator=generator), torch.rand(n)
    y, v, b = torch.arange(n) % c, torch.randn(c, d, generator=generator), torch.randn(c, generator=generator)
    kernels = {case.name: case.operator._kernels.get(("cpu", "cuda")) for case in CASES}
    calls = [
        ("per_example_dot", (h, f, None, None, y, v, b), (0,)),
        ("label_gradient", (h, None, v, b, None, v, None), (3, 0.5)),
        ("last_layer_gradient", (h, f, None, None, y, w), (1,)),
        ("hessian_vector_product", (h, f, None, v, None, None), (0, 0.25)),
    ]
    for name, tensors, numbers in calls:
        expected = kernels[name](*tensors, *numbers)
        expected = expected if isinstance(expected, tuple) else (expected,)
        out = [torch.full_like(e, float("nan")) for e in expected]
        assert call(operators[name], tensors, numbers, out)
        assert all(map(torch.equal, out, expected)), name


def test_what_is_not_theirs_is_left_alone(operators):
    h, f, v = torch.ones(3, 4), torch.zeros(3, 40), torch.ones(40, 4)
    out = torch.full((3,), 7.0)
    assert not call(operators["per_example_dot"], (h, f, None, None, torch.zeros(3, 40), v, None), (0,), (out,))
    assert (out == 7).all()
    table, index = torch.zeros(9), torch.arange(5000) % 9
    state = [torch.zeros(9), torch.zeros(9), torch.zeros(9, dtype=torch.int32)]
    numbers = (0.1, 0.9, 0.999, 1e-8, float("nan"), float("nan"))
    assert not call(operators["masked_adam_"], (table, index, torch.ones(5000), *state), numbers, ())
    assert not table.any()
    assert call(operators["masked_adam_"], (table, index[:4], torch.ones(4), *state), numbers, ())
    torch.testing.assert_close(table, torch.tensor([-0.1] * 4 + [0.0] * 5))


def test_the_entry_takes_what_the_dispatcher_has_dealt_with():
    """Below autograd no state of a tensor is asked for, and results are the schema's; errors are the function's own."""
    h, f, v = torch.ones(3, 4), torch.zeros(3, 2), torch.ones(2, 4)
    entry = next(case.operator.entry for case in CASES if case.name == "hessian_vector_product")
    expected = entry.cuda(h, f, None, v, None, None, 0, 0.5)
    assert [result.shape for result in expected] == [(2, 4), (0,)]
    for got in (
        entry.cuda(h.clone().requires_grad_(), f, None, v, None, None, 0, 0.5),
        entry.cuda(h, f, None, v, None, None, 0, 1),
    ):
        assert not any(result.requires_grad for result in got)
    assert torch.equal(entry.cuda(h, f, None, v, None, None, 0, 0.5)[0], expected[0])
    assert entry.cuda(h.double(), f.double(), None, v.double(), None, None, 0, 0.5) is NotImplemented
    assert entry.cuda(h, torch.zeros(3, 40), None, torch.ones(40, 4), None, None, 0, 0.5) is NotImplemented
    for arguments, message in (
        ((h, f, None, v, None, None, 0, -1.0), "damping must be finite and >= 0, got -1"),
        ((h, f, None, v, None, None, 9, 0.5), "loss must be in"),
        ((h[0], f, None, v, None, None, 0, 0.5), r"features must be 2-D \[N, D\], got 1-D \[4\]"),
        ((h.int(), f, None, v, None, None, 0, 0.5), "features must be float32, bfloat16, float16 or float64, got Int"),
        ((h, f, None, v[:, 1:], None, None, 0, 0.5), r"direction_weight must be \[C, D\] = \[2, 4\], got \[2, 3\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            entry.cuda(*arguments)
    for arguments in (
        (h.tolist(), f, None, v, None, None, 0, 0.5),
        (h.to("meta"), f, None, v, None, None, 0, 0.5),
        (h, f),
    ):
        with pytest.raises(TypeError, match="hessian_vector_product takes 6 plain tensors, all on one device"):
            entry.cuda(*arguments)
