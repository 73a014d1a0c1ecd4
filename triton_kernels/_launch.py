"""Compiles programs of the Triton planners for the executor in C (csrc/entry/program.cpp).

Compiling launches nothing: Triton gives the handle of each kernel and the types of its arguments, and the executor
passes what Triton's own launcher would. Where that is not sure (another Triton, a kernel with scratch memory of its
own), programs run step by step in Python.
"""

import math
import struct
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmeta import _extension

_ALIGNMENT = 256  # bytes, of each buffer in the scratch memory
_TRITON = ("3.6.", "3.7.", "3.8.", "3.9.")  # the versions whose launcher the executor follows
# Triton's types of a kernel's arguments, as struct packs them.
_PACKED = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u8": "B", "u16": "H", "u32": "I"}
_PACKED |= {"u64": "Q", "fp32": "f", "fp64": "d"}

# CUDA's numbers of dtypes.
_CUDA_TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}

_Parameter = tuple[str, Any]


class NoSuchProduct(RuntimeError):
    """The library has no algorithm for a product as the program wants it; nothing was launched."""


class StepByStep(NamedTuple):
    """The plan of a layout whose program Python runs."""

    program: Any  # triton_kernels._program.Program


def run(plan: Any, tensors: Sequence[Tensor | None], numbers: Sequence[float]) -> tuple[Tensor, ...]:
    """Run a plan, of :func:`compile`, on the current stream of the current device, where the tensors are."""
    device = next(tensor.device for tensor in tensors if tensor is not None)
    if isinstance(plan, StepByStep):
        return plan.program.run(tensors, numbers)
    stream, number = (torch.cuda.current_stream().cuda_stream, device.index) if device.type == "cuda" else (0, -1)
    addresses = tuple([0 if tensor is None else tensor.data_ptr() for tensor in tensors])
    return plan.run(addresses, tuple(numbers), stream, number)


def compile(program: Any, tensors: Sequence[Tensor | None], numbers: Sequence[float]) -> Any:
    """The plan of a program of triton_kernels/_program.py: for the executor, or to be run step by step.

    Args:
        program: its steps.
        tensors: arguments of the layout that it was made for.
        numbers: numbers of a call, to count them.

    Raises:
        NoSuchProduct: the library has no algorithm for a product or its epilogue.
    """
    import triton

    if _extension.INTERPRETED or not hasattr(_extension._C, "Program") or not triton.__version__.startswith(_TRITON):
        return StepByStep(program)
    memory = _Memory(program, tensors)
    launched: list[tuple[Any, tuple[int, int, int]] | None] = []
    steps: list[tuple[Any, ...]] = []
    for step in program.steps:
        if hasattr(step, "kernel"):
            compiled = _compiled(step, memory)
            if compiled is None:
                return StepByStep(program)
            launched.append((compiled, step.grid))
            steps.append(_launch(step, compiled, memory))
        else:
            launched.append(None)
            steps.append(_product(step, memory))
    hooks = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook

    def observe(index: int, stream: int, entering: bool) -> None:
        """Calls a profiler's hooks around a launch; they are looked up at every call."""
        of = launched[index]
        if of is not None:
            hooks[not entering](of[0].launch_metadata(of[1], stream))

    observers = tuple(hook.calls for hook in hooks), observe
    _load_libraries()
    try:
        return _extension._C.Program(
            len(tensors), len(numbers), tuple(program.outputs), memory.scratch, tuple(steps), observers
        )
    except LookupError as error:
        raise NoSuchProduct(str(error)) from None


def plan(plan_of: Callable[..., Any], tensors: Sequence[Tensor | None], numbers: Sequence[float]) -> Any:
    """The plan of an operator for arguments of this layout, compiled if it can be.

    Args:
        plan_of: its planner in triton_kernels/. Where cuBLASLt does not sum up columns in passing, it is asked again
            with ``sums_apart=True``.
        tensors: the operator's tensors.
        numbers: its numbers.
    """
    program = plan_of(*tensors, *numbers)
    try:
        return compile(program, tensors, numbers)
    except NoSuchProduct:
        if all(getattr(step, "column_sums", None) is None for step in program.steps):
            return StepByStep(program)
    program = plan_of(*tensors, *numbers, sums_apart=True)
    try:
        return compile(program, tensors, numbers)
    except NoSuchProduct:
        return StepByStep(program)


class _Memory:
    """Where a program's references point."""

    def __init__(self, program: Any, tensors: Sequence[Tensor | None]) -> None:
        self._dtypes: dict[str, list[torch.dtype | None]] = {
            "input": [None if tensor is None else tensor.dtype for tensor in tensors],
            "output": [buffer.dtype for buffer in program.outputs],
            "scratch": [buffer.dtype for buffer in program.scratch],
        }
        self._inputs = tensors
        index = next(tensor.device.index for tensor in tensors if tensor is not None)
        self.device = 0 if index is None else index
        self._begins = []
        size = 0
        for buffer in program.scratch:
            self._begins.append(size)
            bytes_of = math.prod(buffer.shape) * buffer.dtype.itemsize
            size += -(-bytes_of // _ALIGNMENT) * _ALIGNMENT
        self.scratch = size, torch.uint8

    def dtype(self, ref: Any) -> torch.dtype:
        """Of a reference's memory."""
        found = self._dtypes[ref.kind][ref.index]
        assert found is not None, f"the program reads argument {ref.index}, which is absent"
        return found

    def address(self, ref: Any) -> tuple[str, int, int]:
        """As the executor takes it: what, which, and how many bytes on."""
        offset = ref.offset * self.dtype(ref).itemsize
        if ref.kind == "scratch":
            return "scratch", 0, self._begins[ref.index] + offset
        return ref.kind, ref.index, offset

    def alignment(self, ref: Any) -> int:
        """Bytes that the address is known to be a multiple of, at most 16."""
        _, index, offset = self.address(ref)
        tensor = self._inputs[index] if ref.kind == "input" else None
        return math.gcd(16, offset + (0 if tensor is None else tensor.data_ptr()))


class _Pointer:
    """The dtype and alignment by which Triton specializes, in place of a tensor."""

    def __init__(self, dtype: torch.dtype, alignment: int) -> None:
        self.dtype = dtype
        self._address = alignment % 16

    def data_ptr(self) -> int:
        """An address as aligned as the memory is."""
        return self._address


def _is_ref(argument: Any) -> bool:
    return hasattr(argument, "kind")


def _is_number(argument: Any) -> bool:
    return hasattr(argument, "factor")


def _compiled(step: Any, memory: _Memory) -> Any:
    """The kernel for arguments of this layout, loaded; None if the executor cannot launch it."""
    arguments: list[Any] = []
    for argument in step.arguments:
        if _is_ref(argument):
            arguments.append(_Pointer(memory.dtype(argument), memory.alignment(argument)))
        else:
            arguments.append(0.5 if _is_number(argument) else argument)
    compiled = step.kernel.warmup(*arguments, grid=step.grid, **step.constants, **step.options)
    compiled._init_handles()
    metadata = compiled.metadata
    own_memory = metadata.global_scratch_size or metadata.profile_scratch_size
    if own_memory or metadata.launch_cooperative_grid or metadata.launch_pdl or metadata.num_ctas != 1:
        return None
    return compiled


def _launch(step: Any, compiled: Any, memory: _Memory) -> tuple[Any, ...]:
    parameters: list[_Parameter] = []
    kinds = list(compiled.src.signature.values())
    for argument, kind in zip(step.arguments, kinds, strict=False):  # the constants come last
        if kind == "constexpr":
            continue
        if _is_ref(argument):
            parameters.append(("address", memory.address(argument)))
        elif _is_number(argument):
            assert kind == "fp32", f"a number of the call is passed as float32, not {kind}"
            parameters.append(("number", (argument.index, float(argument.factor))))
        else:
            packed = struct.pack("<" + _PACKED[kind], argument)
            parameters.append(("constant", int.from_bytes(packed, "little")))
    # The addresses of global and profile scratch memory, of which the kernel has none.
    parameters += [("constant", 0), ("constant", 0)]
    threads = 32 * compiled.metadata.num_warps
    return "launch", compiled.function, tuple(step.grid), threads, compiled.metadata.shared, tuple(parameters)


def _number(number: Any) -> tuple[int, float]:
    return (number.index, float(number.factor)) if _is_number(number) else (-1, float(number))


def _product(step: Any, memory: _Memory) -> tuple[Any, ...]:
    def matrix(of: Any) -> tuple[Any, ...]:
        if of is None:
            return ()
        dtype = _CUDA_TYPES.get(memory.dtype(of.at))
        if dtype is None:
            raise NoSuchProduct(f"no product in {memory.dtype(of.at)}")
        return memory.address(of.at), dtype, tuple(of.shape), tuple(of.strides), memory.alignment(of.at)

    vector = step.bias if step.bias is not None else step.column_sums
    return (
        "product",
        *(matrix(of) for of in (step.out, step.a, step.b, step.addend)),
        _number(step.alpha),
        _number(step.beta),
        *(() if ref is None else memory.address(ref) for ref in (step.bias, step.column_sums)),
        16 if vector is None else memory.alignment(vector),
        int(step.precision == "tf32"),
        memory.device,
    )


@cache
def _load_libraries() -> None:
    """Find the libraries of CUDA that the executor calls; on a GPU torch has loaded them."""
    if not torch.cuda.is_available():
        return  # tests without a GPU load their own
    _extension._C.use_driver("libcuda.so.1")
    major = (torch.version.cuda or "").partition(".")[0]
    names = [f"libcublasLt.so.{number}" for number in dict.fromkeys((major, "13", "12"))]
    folder = Path(torch.__file__).parents[1] / "nvidia"
    _extension._C.use_cublaslt(*names, *(str(path) for path in sorted(folder.glob("*/lib/libcublasLt.so.*"))))
