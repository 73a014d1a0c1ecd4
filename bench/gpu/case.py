"""What the GPU benchmark measures, as data; ``bench.case`` has the variants and problems."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.case import Problem, Role, Variant, flat
from bench.gpu.floors import Gemm
from bench.gpu.rows import MAX_AUTOTUNE

MAX_SETS = 24
MAX_SET_BYTES = 2**31  # of all sets together
# By the name of their variant. The second without torch.compile's own graphs: all variants are captured alike.
COMPILE_MODES = {"torch.compile": None, MAX_AUTOTUNE: "max-autotune-no-cudagraphs"}


@dataclass(frozen=True)
class GpuCase:
    """One operator at one shape.

    Args:
        operator: its name.
        label: the shape, and what else tells it apart.
        build: the problem in a dtype on a device.
        gemms: the products it cannot do without.
        dtypes: those measured.
        main: the variant that the others are compared with.
        shape: N, D and C, for the cost model's choice of a form.
        from_head: whether the logits are recomputed.
    """

    operator: str
    label: str
    build: Callable[[torch.dtype, str], Problem]
    gemms: tuple[Gemm, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    main: str = "fastmeta"
    shape: tuple[int, int, int] | None = None
    from_head: bool = False

    def key(self, dtype: torch.dtype) -> str:
        return f"{self.operator} ({self.label}) {str(dtype).removeprefix('torch.')}"


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
    if device != "cuda":
        return 0
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


def number_of_sets(num_bytes: float, device: str) -> int:
    """Sets of arguments that together are three times the L2 cache, up to a limit: tiny ones stay within it."""
    wanted = math.ceil(3 * l2_bytes(device) / max(num_bytes, 1.0))
    return max(1, min(wanted, MAX_SETS, int(MAX_SET_BYTES / max(num_bytes, 1.0))))


@dataclass(frozen=True)
class Form:
    """One way of fastmeta to serve the call: an implementation by name, or the one it chooses itself."""

    name: str
    impl: str | None = None
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


def variants(
    ours: Callable[..., Any],
    forms: Sequence[Form],
    eager: Sequence[tuple[str, Callable[..., Any]]],
    sets: Sequence[tuple[Any, ...]],
) -> list[Variant]:
    """Ours in each form, each eager formula, and the first of those in both modes of ``torch.compile``."""
    found = [
        rotating(
            form.name,
            ours if form.impl is None else partial(ours, impl=form.impl),
            sets,
            "fastmeta",
            around=form.around,
        )
        for form in forms
    ]
    found += [rotating(name, function, sets, "eager") for name, function in eager]
    found += [
        rotating(name, torch.compile(eager[0][1], dynamic=False, fullgraph=True, mode=mode), sets, "compile")
        for name, mode in COMPILE_MODES.items()
    ]
    return found


def rotating(
    name: str, function: Callable[..., Any], sets: Sequence[tuple[Any, ...]], role: Role = "peer", **options: Any
) -> Variant:
    """A variant on all sets of arguments in turn; ``options`` are those of :class:`bench.case.Variant`."""
    call = Rotation(function, sets)
    return Variant(name, call, role, check=call.first, **options)


def distance_of_rows(truth: Tensor, rows: Tensor) -> Callable[[Tensor], float]:
    """Relative error of those rows of a result."""
    expected = truth.double()

    def error(result: Tensor) -> float:
        got = result.detach()[rows].double()
        return float((got - expected).norm() / expected.norm())

    return error


def distance_of_sums(truth: Sequence[Tensor]) -> Callable[[Any], float]:
    """Relative error of all tensors of a result together."""
    expected = flat(truth)

    def error(result: Any) -> float:
        got = flat(result)
        return float((got - expected).norm() / expected.norm())

    return error


def checked_rows(num_rows: int, num_columns: int, device: str) -> Tensor:
    """Rows at both ends: all of them, unless their float64 copies would take gigabytes."""
    most = max(2, 2**27 // max(num_columns, 1))
    if num_rows <= most:
        return torch.arange(num_rows, device=device)
    half = most // 2
    return torch.cat([torch.arange(half, device=device), torch.arange(num_rows - half, num_rows, device=device)])
