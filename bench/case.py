"""What is measured, as data: a case makes a problem in a dtype on a device, a problem has variants that solve it."""

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from bench.floors import Cost
from bench.rows import MAX_AUTOTUNE

Role = Literal["fastmeta", "eager", "compile", "peer"]
Build = Callable[[torch.dtype, str], "Problem"]

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
    call: Callable[[], Any]
    role: Role = "peer"
    grad: bool = False  # whether autograd records during the call
    prepare: Callable[[], Any] | None = None  # puts in-place state back before the result is checked
    check: Callable[[], Any] | None = None  # a call that returns the result, where `call` does not
    graph: bool = True  # whether a CUDA graph can hold the call: it reads nothing back to the host
    around: Callable[[], AbstractContextManager[Any]] = nullcontext  # what all its calls happen in
    examples: int | None = None  # how many of the problem's examples it handles, when not all of them
    describe: Callable[[Any], dict[str, Any]] | None = None  # what to record of the result, e.g. iterations
    note: str = ""


@dataclass(frozen=True)
class Problem:
    """Variants of one computation, the truth they are held to, and what it costs at least."""

    variants: list[Variant]
    error: Callable[[Any], float]  # relative error of a result
    cost: Cost
    tolerance: float
    num_examples: int = 0


@dataclass(frozen=True)
class Case:
    """One operator at one shape.

    Args:
        operator: its name.
        label: the shape, and what else tells it apart.
        build: the problem in a dtype on a device.
        dtypes: those measured.
        main: the variant that the others are compared with.
        note: for the report.
        shape: N, D and C, where there are such.
        from_head: whether the logits are recomputed.
    """

    operator: str
    label: str
    build: Build
    dtypes: tuple[torch.dtype, ...] = BOTH
    main: str = "fastmeta"
    note: str = ""
    shape: tuple[int, int, int] | None = None
    from_head: bool = False

    def key(self, dtype: torch.dtype) -> str:
        return f"{self.operator} ({self.label}) {dtype_name(dtype)}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def bytes_of(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def flat(result: Any) -> Tensor:
    """A tensor, or several, as one float64 vector."""
    tensors = [result] if isinstance(result, Tensor) else [t for t in result if isinstance(t, Tensor)]
    return torch.cat([t.detach().double().reshape(-1) for t in tensors])


def distance_to(truth: Any, rows: Tensor | None = None, prefix: bool = False) -> Callable[[Any], float]:
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


def lazily(make: Callable[[], Callable[[Any], float]]) -> Callable[[Any], float]:
    """An error whose truth is computed when the first result is held to it."""
    made = functools.cache(make)
    return lambda result: made()(result)


def checked_rows(num_rows: int, num_columns: int, device: str) -> Tensor:
    """Rows at both ends: all of them, unless their float64 copies would take gigabytes."""
    most = max(2, 2**27 // max(num_columns, 1))
    if num_rows <= most:
        return torch.arange(num_rows, device=device)
    half = most // 2
    return torch.cat([torch.arange(half, device=device), torch.arange(num_rows - half, num_rows, device=device)])


class Rotation:
    """A call that takes another set of arguments each time, so that a small cache cannot hold them all."""

    def __init__(self, function: Callable[..., Any], sets: Sequence[tuple[Any, ...]]) -> None:
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


@dataclass(frozen=True)
class Form:
    """One way of fastmeta to serve the call: an implementation by name, or the one it chooses itself."""

    name: str
    impl: str | None = None
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


def compile_modes(dtype: torch.dtype, device: str) -> dict[str, str | None]:
    """Both modes on a GPU; on the CPU, where tuning changes nothing, the default in float32."""
    if device == "cuda":
        return COMPILE_MODES
    return {"torch.compile": None} if dtype == torch.float32 else {}


def compiled(function: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
    """``torch.compile`` for exactly the shapes of the first call."""
    return torch.compile(function, dynamic=False, fullgraph=True, mode=mode)


def variants(
    ours: Callable[..., Any],
    forms: Sequence[Form],
    eager: Sequence[tuple[str, Callable[..., Any]]],
    sets: Sequence[tuple[Any, ...]],
    modes: dict[str, str | None],
) -> list[Variant]:
    """Ours in each form, each eager formula, and the first of those in each mode of ``torch.compile``."""
    found = []
    for form in forms:
        function = ours if form.impl is None else partial(ours, impl=form.impl)
        found.append(rotating(form.name, function, sets, "fastmeta", around=form.around))
    found += [rotating(name, function, sets, "eager") for name, function in eager]
    return found + [rotating(name, compiled(eager[0][1], mode), sets, "compile") for name, mode in modes.items()]


def rotating(
    name: str, function: Callable[..., Any], sets: Sequence[tuple[Any, ...]], role: Role = "peer", **options: Any
) -> Variant:
    """A variant on all sets of arguments in turn; ``options`` are those of :class:`Variant`."""
    if len(sets) == 1:
        return Variant(name, partial(function, *sets[0]), role, **options)
    call = Rotation(function, sets)
    return Variant(name, call, role, check=call.first, **options)
