"""Products of programs: what cuBLASLt is asked for, against torch, with a library that multiplies on the host."""

import ctypes
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastmeta import _extension

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not hasattr(_extension._C, "use_cublaslt"), reason="needs the C++ extension")
SOURCE = Path(__file__).parents[1] / "cublaslt_of_tests.c"


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    path = tmp_path_factory.mktemp("cublaslt") / "libcublasLt_of_tests.so"
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", str(SOURCE), "-o", str(path)], check=True)
    _extension._C.use_cublaslt(str(path))
    return ctypes.CDLL(str(path))


def compiled(program, tensors, numbers):
    from fastmeta.triton_kernels import _launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_extension, "INTERPRETED", False)  # products run on the host here, kernels are not among them
        return _launch.compile(program, tensors, numbers)


def matrix(tensor, index: int):
    """An argument's."""
    from fastmeta.triton_kernels._program import Matrix, Ref

    return Matrix(Ref("input", index), tuple(tensor.shape), tensor.stride())


def strided(draw: random.Random, rows: int, columns: int, dtype: torch.dtype, by_rows: bool | None = None):
    """A random matrix whose rows or columns are dense, at any distance and at any place."""
    if by_rows is None:
        by_rows = draw.random() < 0.5
    outer, inner = (rows, columns) if by_rows else (columns, rows)
    pitch, offset = inner + draw.choice([0, 1, 3, 8]), draw.choice([0, 1, 8])
    memory = torch.randn(offset + outer * pitch + 1).to(dtype)
    view = memory.as_strided((outer, inner), (pitch, 1), offset)
    return view if by_rows else view.T


def product(draw: random.Random, dtype: torch.dtype):
    """A product of random shapes and layouts, its tensors and numbers, and what it should give."""
    from fastmeta.triton_kernels._program import Buffer, Matrix, Number, Product, Program, Ref

    rows, inner, columns = (draw.choice([1, 2, 3, 5, 8, 17]) for _ in range(3))
    a, b = strided(draw, rows, inner, dtype), strided(draw, inner, columns, dtype)
    by_rows = draw.random() < 0.8
    tensors = [a, b]
    alpha, beta = draw.choice([(1.0, 1.0), (0.5, 1.0), (Number(0, 2.0), Number(1))])
    numbers = (0.75, -1.5)
    wanted = (1.5 if isinstance(alpha, Number) else alpha) * (a.float() @ b.float())
    more = {}
    if draw.random() < 0.5:
        addend = strided(draw, rows, columns, dtype, by_rows)
        more |= {"addend": matrix(addend, len(tensors)), "beta": beta}
        tensors.append(addend)
        wanted = wanted + (-1.5 if isinstance(beta, Number) else beta) * addend.float()
    kind = draw.choice(["plain", "bias", "sums"])
    outputs = [Buffer((rows, columns) if by_rows else (columns, rows), dtype)]
    if kind == "bias" and by_rows:
        bias = torch.randn(columns + 3).to(dtype)[3:]
        more |= {"bias": Ref("input", len(tensors))}
        tensors.append(bias)
        wanted = wanted + bias.float()
    if kind == "sums":
        more |= {"column_sums": Ref("output", 1)}
        outputs.append(Buffer((rows,), dtype))
    out = Matrix(Ref("output", 0), (rows, columns), (columns, 1) if by_rows else (1, rows))
    step = Product(out, matrix(a, 0), matrix(b, 1), alpha, **more)
    sums = a.float().sum(1) if kind == "sums" else None
    return Program(tuple(outputs), (Buffer((7,), torch.float32),), (step,)), tensors, numbers, wanted, sums, by_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("library")
def test_products_of_any_layout(dtype):
    from fastmeta.triton_kernels import _launch

    draw, tolerance = random.Random(7), 1e-5 if dtype == torch.float32 else 2e-2
    for _ in range(400):
        program, tensors, numbers, wanted, sums, by_rows = product(draw, dtype)
        plan = compiled(program, tensors, numbers)
        results = _launch.run(plan, tensors, numbers)
        got = results[0] if by_rows else results[0].T
        assert torch.allclose(got.float(), wanted, rtol=tolerance, atol=tolerance * 10), program
        if sums is not None:
            assert torch.allclose(results[1].float(), sums, rtol=tolerance, atol=tolerance * 10), program
        (interpreted, *_), want = program.run(tensors, numbers), got if by_rows else got.T
        assert torch.allclose(interpreted.float(), want.float(), rtol=tolerance, atol=tolerance * 10)


def answers(library):
    alignment, others = (ctypes.c_uint32 * 4)(), (ctypes.c_uint64 * 5)()
    library.asked_for(alignment, others)
    return list(alignment), dict(zip(("workspace", "reduction", "compute", "live", "epilogue"), others, strict=True))


def simple(dtype: torch.dtype = torch.float32, **more):
    from fastmeta.triton_kernels._program import Buffer, Matrix, Product, Program, Ref

    a, b = torch.randn(6, 4).to(dtype), torch.randn(33).to(dtype)[1:].view(4, 8)
    step = Product(Matrix(Ref("output", 0), (6, 8), (8, 1)), matrix(a, 0), matrix(b, 1), **more)
    outputs = Buffer((6, 8), dtype), Buffer((6,), dtype)
    return Program(outputs, (), (step,)), (a, b)


def test_what_the_heuristic_is_asked(library):
    from fastmeta.triton_kernels import _launch

    program, tensors = simple()
    plan = compiled(program, tensors, ())
    alignment, others = answers(library)
    assert alignment == [4, 16, 16, 16], "its first operand is our second, which is off by one float"
    assert (others["workspace"], others["reduction"]) == (32 << 20, 2)
    _launch.run(plan, tensors, ())
    assert answers(library)[1]["compute"] == 68
    program, tensors = simple(precision="tf32")
    _launch.run(compiled(program, tensors, ()), tensors, ())
    assert answers(library)[1]["compute"] == 77
    del plan
    assert answers(library)[1]["live"] == 0, "everything is destroyed"


def test_the_sums_of_a_gradient_s_rows_are_of_the_second_operand(library):
    """``R^T h`` with dense rows of R and h is N, T with BGRADB: the layout known from training libraries."""
    from fastmeta.triton_kernels import _launch
    from fastmeta.triton_kernels._program import Buffer, Matrix, Product, Program, Ref

    r, h = torch.randn(5, 3), torch.randn(5, 4)
    out = Matrix(Ref("output", 0), (3, 4), (4, 1))
    step = Product(out, matrix(r, 0).transposed, matrix(h, 1), column_sums=Ref("output", 1))
    program = Program((Buffer((3, 4), torch.float32), Buffer((3,), torch.float32)), (), (step,))
    weight, bias = _launch.run(compiled(program, (r, h), ()), (r, h), ())
    assert answers(library)[1]["epilogue"] == 512
    assert torch.allclose(weight, r.T @ h, atol=1e-5)
    assert torch.allclose(bias, r.sum(0), atol=1e-5)


def test_what_the_library_does_not_have_is_said_before_anything_runs(library):
    from fastmeta.triton_kernels import _launch
    from fastmeta.triton_kernels._program import Ref

    program, tensors = simple(column_sums=Ref("output", 1))
    library.refuse(512)
    try:
        with pytest.raises(_launch.NoSuchProduct, match="no algorithm"):
            compiled(program, tensors, ())
    finally:
        library.refuse(0)
    for dtype in (torch.float64, torch.int64):
        with pytest.raises(_launch.NoSuchProduct, match="no product in"):
            compiled(*simple(dtype), ())
    program, (a, b) = simple()
    step = program.steps[0]
    nowhere_dense = step._replace(a=step.a._replace(strides=(8, 2)))
    with pytest.raises(_launch.NoSuchProduct, match="neither rows nor columns"):
        compiled(program._replace(steps=(nowhere_dense,)), (a, b), ())
    crossed = step._replace(addend=step.out._replace(strides=(1, 6)), beta=1.0)
    with pytest.raises(_launch.NoSuchProduct, match="not dense along the same side"):
        compiled(program._replace(steps=(crossed,)), (a, b), ())
    assert answers(library)[1]["live"] == 0
