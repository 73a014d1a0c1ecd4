"""What is benchmarked, as data: a case holds its problem in each dtype, a problem the variants that solve it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from bench.roofline import Cost

Role = Literal["fastmeta", "eager", "compile", "peer"]

# Largest accepted ||result - truth|| / ||truth||, with the truth computed in float64 from the same rounded inputs.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-10}


@dataclass(frozen=True)
class Variant:
    """One way to get the result. ``call`` is what is timed."""

    name: str
    call: Callable[[], Any]
    role: Role = "peer"
    grad: bool = False  # whether autograd records during the call
    prepare: Callable[[], Any] | None = None  # puts in-place state back before the result is checked
    check: Callable[[], Any] | None = None  # a call that returns the result, where `call` returns none
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
    """One operator at one shape."""

    operator: str
    label: str
    build: Callable[[torch.dtype], Problem]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    main: str = "fastmeta"  # the variant the others are compared with
    note: str = ""


def flat(result: Any) -> Tensor:
    """A tensor, or several, as one float64 vector."""
    tensors = [result] if isinstance(result, Tensor) else [t for t in result if isinstance(t, Tensor)]
    return torch.cat([t.detach().double().reshape(-1) for t in tensors])


def distance_to(truth: Any, rows: int | None = None) -> Callable[[Any], float]:
    """Relative error against ``truth``; a result of fewer rows is compared with the first ones."""
    expected = flat(truth)

    def error(result: Any) -> float:
        got = flat(result)
        wanted = expected if rows is None else expected[: got.numel()]
        if got.shape != wanted.shape:
            raise ValueError(f"result has {got.numel()} values, expected {wanted.numel()}")
        return float((got - wanted).norm() / wanted.norm())

    return error


def compiled(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """``torch.compile`` of ``function`` for exactly these shapes."""
    return partial(torch.compile(function, dynamic=False, fullgraph=True), *arguments)


def bytes_of(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def closed_forms(
    ours: Callable[..., Any], forms: Sequence[tuple[str, Callable[..., Any]]], arguments: tuple[Any, ...], compile: bool
) -> list[Variant]:
    """fastmeta, each eager form, and ``torch.compile`` of the first, all on the same arguments."""
    variants = [Variant("fastmeta", partial(ours, *arguments), "fastmeta")]
    variants += [Variant(name, partial(form, *arguments), "eager") for name, form in forms]
    if compile:
        variants.append(Variant("torch.compile", compiled(forms[0][1], *arguments), "compile"))
    return variants
