"""A call of one layout as data: results, scratch memory, and steps, each a kernel's launch or a library product.

A planner makes a program once for the shapes, strides, alignment and dtype of its tensors, so that every argument but
addresses and a few numbers is a constant. On a GPU the program is run in C (csrc/entry/program.cpp); here it runs under
Triton's interpreter, and its launches can be collected to be compiled where there is no GPU.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
import triton
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
if INTERPRETED:
    from fastmeta.triton_kernels import _interpreter

    _interpreter.repair()


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_dtype(tensor: Tensor) -> None:
    """A dtype that the kernels take."""
    if tensor.dtype not in DTYPES:
        raise TypeError(f"the Triton kernels take float32, bfloat16 and float16, got {tensor.dtype}")


def precision_of(tensor: Tensor) -> str:
    """Of float32 products: TF32 where torch's own setting for CUDA allows it, else ``ieee``."""
    tf32 = tensor.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


class Buffer(NamedTuple):
    """Contiguous memory of a call."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Ref(NamedTuple):
    """A place in memory: of an argument, a result or a scratch buffer, so many of its elements on."""

    kind: Literal["input", "output", "scratch"]
    index: int
    offset: int = 0

    def shifted(self, elements: int) -> "Ref":
        """The place so many elements on."""
        return self._replace(offset=self.offset + elements)


class Number(NamedTuple):
    """A number of the call, times a constant."""

    index: int
    factor: float = 1.0


Argument = Ref | Number | int | float | None


class Launch(NamedTuple):
    """One kernel; its constants come by name, in the kernel's order."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: tuple[Argument, ...]
    constants: dict[str, Any]
    options: dict[str, int]  # num_warps, num_stages, maxnreg


class Matrix(NamedTuple):
    """A matrix in memory; one of its strides is 1."""

    at: Ref
    shape: tuple[int, int]
    strides: tuple[int, int]

    @property
    def transposed(self) -> "Matrix":
        """The same memory, rows and columns exchanged."""
        return Matrix(self.at, self.shape[::-1], self.strides[::-1])


class Product(NamedTuple):
    """``out = alpha a b + beta addend + bias``, of one dtype, added up in float32.

    ``bias`` has one entry for each column. ``column_sums``, one for each row of ``out``, are the sums of ``a`` over its
    columns, made in the same launch: with ``a = R^T`` the gradient of the bias.
    """

    out: Matrix
    a: Matrix
    b: Matrix
    alpha: float | Number = 1.0
    beta: float | Number = 0.0
    addend: Matrix | None = None
    bias: Ref | None = None
    column_sums: Ref | None = None
    precision: str = "ieee"  # of float32 products


class Program(NamedTuple):
    """What one call does."""

    outputs: tuple[Buffer, ...]
    scratch: tuple[Buffer, ...]
    steps: tuple[Launch | Product, ...]

    def run(self, tensors: Sequence[Tensor | None], numbers: Sequence[float] = ()) -> tuple[Tensor, ...]:
        """Run on the tensors' device, step by step: under the interpreter, or to be recorded."""
        like = next(tensor for tensor in tensors if tensor is not None)
        kind = like.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):  # products keep their operands' dtype
                return self.run(tensors, numbers)
        outputs = tuple(torch.empty(b.shape, dtype=b.dtype, device=like.device) for b in self.outputs)
        scratch = tuple(torch.empty(b.shape, dtype=b.dtype, device=like.device) for b in self.scratch)
        memory = {"input": tensors, "output": outputs, "scratch": scratch}
        for step in self.steps:
            if isinstance(step, Product):
                if _recorded is None:
                    _multiply(step, memory, numbers)
            else:
                arguments = tuple(_value(argument, memory, numbers) for argument in step.arguments)
                if _recorded is None:
                    step.kernel[step.grid](*arguments, **step.constants, **step.options)
                else:
                    _recorded.append(Recorded(step.kernel, step.grid, arguments, step.constants, step.options))
        return outputs


class Recorded(NamedTuple):
    """A launch that was asked for while :func:`recording`."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, int]


_recorded: list[Recorded] | None = None


@contextlib.contextmanager
def recording() -> Iterator[list[Recorded]]:
    """Collect launches instead of making them, so that they can be compiled where there is no GPU."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def is_recording() -> bool:
    """Whether launches are collected."""
    return _recorded is not None


def launch(
    kernel: Any,
    grid: Sequence[int],
    arguments: Sequence[Argument],
    constants: dict[str, Any],
    *,
    num_warps: int = 4,
    num_stages: int = 1,
    max_registers: int | None = None,
) -> Launch:
    """A launch of a kernel whose last parameters are the constants."""
    names = tuple(kernel.arg_names[-len(constants) :]) if constants else ()
    assert names == tuple(constants), f"constants must be the last parameters {names}, got {tuple(constants)}"
    assert len(arguments) + len(constants) == len(kernel.arg_names), (
        f"{kernel.arg_names} are {len(arguments)} arguments"
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if max_registers is not None:
        options["maxnreg"] = max_registers
    return Launch(kernel, (*grid, 1, 1)[:3], tuple(arguments), constants, options)  # type: ignore[arg-type]


def _place(at: Ref, memory: Any) -> Tensor:
    tensor = memory[at.kind][at.index]
    if at.offset == 0:
        return tensor
    return torch.as_strided(tensor, (1,), (1,), tensor.storage_offset() + at.offset)


def _value(argument: Argument, memory: Any, numbers: Sequence[float]) -> Any:
    if isinstance(argument, Ref):
        return _place(argument, memory)
    return _number(argument, numbers) if isinstance(argument, Number) else argument


def _number(number: float | Number, numbers: Sequence[float]) -> float:
    return numbers[number.index] * number.factor if isinstance(number, Number) else number


def _view(matrix: Matrix, memory: Any) -> Tensor:
    tensor = memory[matrix.at.kind][matrix.at.index]
    return torch.as_strided(tensor, matrix.shape, matrix.strides, tensor.storage_offset() + matrix.at.offset)


def _multiply(step: Product, memory: Any, numbers: Sequence[float]) -> None:
    out, a, b = (_view(matrix, memory) for matrix in (step.out, step.a, step.b))
    wide = torch.float64 if out.dtype == torch.float64 else torch.float32
    if out.is_cuda:  # added up in float32 by the library itself
        result = _number(step.alpha, numbers) * torch.mm(a, b).to(wide)
    else:
        result = _number(step.alpha, numbers) * (a.to(wide) @ b.to(wide))
    if step.addend is not None:
        result += _number(step.beta, numbers) * _view(step.addend, memory).to(wide)
    if step.bias is not None:
        result += _view(Matrix(step.bias, (1, out.shape[1]), (0, 1)), memory).to(wide)
    if step.column_sums is not None:
        sums = a.to(wide).sum(1)
        _view(Matrix(step.column_sums, (1, len(sums)), (0, 1)), memory).copy_(sums[None])
    out.copy_(result)


def is_dense(matrix: Matrix) -> bool:
    """Whether the library can read the matrix: one unit stride, and rows or columns that do not overlap."""
    rows, columns = matrix.shape
    row, column = matrix.strides
    by_rows = column == 1 and (rows == 1 or row >= columns)
    return by_rows or (row == 1 and (columns == 1 or column >= rows) and rows > 1)


def vector_step(tensor: Tensor | None) -> int:
    """The stride of a vector that may be left out."""
    return 0 if tensor is None else tensor.stride(0)


def multiple(*sizes: int) -> int:
    """The largest power of two, up to 8, that divides all sizes.

    Triton specializes for strides that are multiples of 16, not of smaller numbers. A kernel that is given the stride
    divided by this number, and multiplies it back, can read vectors of so many entries.
    """
    return math.gcd(8, *sizes)
