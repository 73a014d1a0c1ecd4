"""What is measured, as data: a case makes a workload in a dtype on a device, a workload has variants that solve it."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bench.rows import MAX_AUTOTUNE

Role = Literal["fastmeta", "eager", "compile", "peer"]
Function = Callable[..., Any]
Error = Callable[[Any], float]  # relative error of a result

# Largest accepted ||result - truth|| / ||truth||, with the truth computed in float64 from the same rounded inputs.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-10}
BOTH = (torch.bfloat16, torch.float32)
MAX_SETS = 24
MAX_SET_BYTES = 2**31  # of all sets together
# By the name of their variant. The second without torch.compile's own graphs: all variants are captured alike.
COMPILE_MODES = {"torch.compile": None, MAX_AUTOTUNE: "max-autotune-no-cudagraphs"}


@dataclass(frozen=True)
class Variant:
    """One way to get the result. ``call`` is what is timed."""

    name: str
    call: Function
    role: Role = "peer"
    grad: bool = False  # whether autograd records during the call
    prepare: Callable[[], Any] | None = None  # puts in-place state back before the result is checked
    check: Callable[[], Any] | None = None  # a call that returns the result, where `call` does not
    graph: bool = True  # whether a CUDA graph can hold the call: it reads nothing back to the host
    around: Callable[[], AbstractContextManager[Any]] = nullcontext  # entered around its calls
    examples: int | None = None  # how many of the workload's examples it handles, when not all of them
    describe: Callable[[Any], dict[str, Any]] | None = None  # what to record of the result, e.g. iterations
    note: str = ""

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """The context of its calls: ``around``, and whether autograd records."""
        with self.around(), torch.set_grad_enabled(self.grad):
            yield

    def result(self) -> Any:
        """Of one call that starts from the state that the truth belongs to."""
        if self.prepare is not None:
            self.prepare()
        return (self.check or self.call)()


class Gemm(NamedTuple):
    """A product ``[rows, inner] [inner, columns]``, with the operands as an operator has them in memory.

    ``nt``: the right one is stored ``[columns, inner]`` (``h V^T``); ``tn``: the left one ``[inner, rows]``
    (``R^T h``).
    """

    rows: int
    inner: int
    columns: int
    kind: Literal["nn", "nt", "tn"]

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.inner * self.columns

    def operands(self, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
        left = (self.inner, self.rows) if self.kind == "tn" else (self.rows, self.inner)
        right = (self.columns, self.inner) if self.kind == "nt" else (self.inner, self.columns)
        # Not zeros: a product of zeros draws less power and runs faster.
        a, b = torch.randn(left, device=device).to(dtype), torch.randn(right, device=device).to(dtype)
        return (a.T if self.kind == "tn" else a), (b.T if self.kind == "nt" else b)


class Cost(NamedTuple):
    """What a computation cannot avoid: multiply-adds counted twice, every operand read once, every result written once.

    The library's own time for the products it cannot do without is a peer, not a floor.
    """

    flops: float
    bytes: float
    working_set: float | None = None  # memory the bytes are spread over, where that is more than the bytes themselves
    products: tuple[Gemm, ...] = ()
    row_bytes: float = 0.0  # read and written by the row kernels between the products


@dataclass(frozen=True)
class Workload:
    """Variants of one computation, the truth they are held to, and what it costs at least."""

    variants: list[Variant]
    error: Error
    cost: Cost
    tolerance: float
    num_examples: int = 0


@dataclass(frozen=True)
class Case:
    """One operator at one shape."""

    operator: str
    label: str  # the shape, and what else tells it apart
    build: Callable[[torch.dtype, str], Workload]  # in a dtype on a device
    dtypes: tuple[torch.dtype, ...] = BOTH
    main: str = "fastmeta"  # the variant that the others are compared with
    note: str = ""
    shape: tuple[int, int, int] | None = None  # N, D and C, where there are such

    def key(self, dtype: torch.dtype) -> str:
        return f"{self.operator} ({self.label}) {dtype_name(dtype)}"

    @property
    def is_large(self) -> bool:
        """Whether its inputs are gigabytes, or its calls take many milliseconds."""
        return math.prod(self.shape or (0,)) > 2**34


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def bytes_of(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def tensors_in(*values: Any) -> list[Tensor]:
    """The tensors among results or arguments, some of which may be tuples or lists of them."""
    found: list[Tensor] = []
    for value in values:
        nested = tensors_in(*value) if isinstance(value, tuple | list) else []
        found += [value] if isinstance(value, Tensor) else nested
    return found


def flat(result: Any) -> Tensor:
    """A tensor, or several, as one float64 vector."""
    return torch.cat([t.detach().double().reshape(-1) for t in tensors_in(result)])


def distance_to(truth: Any, rows: Tensor | None = None, prefix: bool = False) -> Error:
    """Relative error against ``truth``.

    Args:
        truth: a tensor or several.
        rows: those of the result that ``truth`` holds.
        prefix: a result of fewer rows is compared with the first ones.
    """
    expected = flat(truth)

    def error(result: Any) -> float:
        got = flat(result if rows is None else result.detach()[rows])
        wanted = expected[: got.numel()] if prefix else expected
        if got.shape != wanted.shape:
            raise ValueError(f"result has {got.numel()} values, expected {wanted.numel()}")
        return float((got - wanted).norm() / wanted.norm())

    return error


def checked_rows(num_rows: int, num_columns: int, device: str) -> Tensor:
    """Rows at both ends: all of them, unless their float64 copies would take gigabytes."""
    most = max(2, 2**27 // max(num_columns, 1))
    if num_rows <= most:
        return torch.arange(num_rows, device=device)
    half = most // 2
    return torch.cat([torch.arange(half, device=device), torch.arange(num_rows - half, num_rows, device=device)])


class Rotation:
    """A call that takes another set of arguments each time, so that a small cache cannot hold them all."""

    def __init__(self, function: Function, sets: Sequence[tuple[Any, ...]]) -> None:
        self.function, self.sets, self.place = function, sets, 0

    def __call__(self) -> Any:
        arguments = self.sets[self.place]
        self.place = (self.place + 1) % len(self.sets)
        return self.function(*arguments)

    def first(self) -> Any:
        """The result for the first set, which the truth belongs to."""
        return self.function(*self.sets[0])


def l2_bytes(device: str) -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size if device == "cuda" else 0


def number_of_sets(num_bytes: float, device: str) -> int:
    """Sets of arguments that together are three times the L2 cache, up to a limit: tiny ones stay within it.

    One on the CPU: what a training step hands to an operator is in cache where it fits.
    """
    wanted = math.ceil(3 * l2_bytes(device) / max(num_bytes, 1.0))
    return max(1, min(wanted, MAX_SETS, int(MAX_SET_BYTES / max(num_bytes, 1.0))))


class Form(NamedTuple):
    """One way of fastmeta to serve the call: an implementation by name, or the one it chooses itself."""

    name: str
    impl: str | None = None
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


def compile_modes(dtype: torch.dtype, device: str) -> dict[str, str | None]:
    """Both modes on a GPU; on the CPU, where tuning changes nothing, the default in float32."""
    if device == "cuda":
        return COMPILE_MODES
    return {"torch.compile": None} if dtype == torch.float32 else {}


def compiled(function: Function, mode: str | None = None) -> Function:
    """``torch.compile`` for exactly the shapes of the first call."""
    return torch.compile(function, dynamic=False, fullgraph=True, mode=mode)


def workload_on_sets(
    ours: Function,
    forms: Sequence[Form],
    eager: Sequence[tuple[str, Function]],
    arguments: Callable[[int], tuple[Any, ...]],
    error: Callable[[tuple[Any, ...]], Error],
    result_bytes: int,
    products: tuple[Gemm, ...],
    dtype: torch.dtype,
    device: str,
    row_bytes: float = 0.0,
) -> Workload:
    """Ours in each form, each eager formula, and the first of those in each mode of ``torch.compile``.

    All take the ``arguments`` of a seed, ours also ``impl``; calls rotate over sets of them where the device has a
    cache that would hold one. ``error`` judges results by the first set.
    """
    first = arguments(0)
    read = bytes_of(*tensors_in(*first))
    sets = [first, *(arguments(seed) for seed in range(1, number_of_sets(read, device)))]

    def on_sets(name: str, function: Function, role: Role, **options: Any) -> Variant:
        if len(sets) == 1:
            return Variant(name, partial(function, *first), role, **options)
        call = Rotation(function, sets)
        return Variant(name, call, role, check=call.first, **options)

    found = [
        on_sets(form.name, ours if form.impl is None else partial(ours, impl=form.impl), "fastmeta", around=form.around)
        for form in forms
    ]
    found += [on_sets(name, function, "eager") for name, function in eager]
    modes = compile_modes(dtype, device)
    found += [on_sets(name, compiled(eager[0][1], mode), "compile") for name, mode in modes.items()]
    moved = read + result_bytes
    cost = Cost(sum(gemm.flops for gemm in products), moved, len(sets) * moved, products, row_bytes)
    truth = functools.cache(partial(error, first))  # computed when the first result is held to it
    return Workload(found, lambda result: truth()(result), cost, TOLERANCE[dtype], len(first[0]))
