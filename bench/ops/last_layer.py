"""What the four last-layer operators have in common: cases with logits, cases with a Head, the truth in float64."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import fastmeta
from bench import kernels
from bench.case import Case, Error, Gemm, Variant, Workload, checked_rows, compile_modes, distance_to, workload_on_sets
from bench.inputs import SHAPES, LastLayer, Shape, last_layer

FORWARD = "with the head's forward"
BACKWARD = "with the head's forward and backward"
_LARGE = 2**24  # logits from which peers that keep many copies of them are left out
_CHUNK = 2**27  # entries of a block of the truth's logits


@dataclass(frozen=True)
class Operator:
    """An operator as the benchmark calls it."""

    name: str  # in `fastmeta.ops`
    call: Callable[..., Any]  # fastmeta's, on the arguments and `impl`
    eager: tuple[tuple[str, Callable[..., Any]], ...]  # closed forms; the first, in float64, is the truth
    arguments: Callable[[LastLayer], tuple[Any, ...]]  # of one batch; a head in place of its logits where `from_head`
    products: Callable[[Shape], tuple[Gemm, ...]]
    row_passes: int  # matrices [N, C] that are read or written between those products
    result_numbers: Callable[[Shape], int]  # a result row for each example, or `sum_numbers` over the examples
    peers: Callable[[LastLayer], list[Variant]] = lambda x: []  # what else users have
    from_head: bool = False  # whether the logits are recomputed


def tangent(shape: Shape) -> Gemm:
    """``z = h V^T``, and the logits of a head."""
    return Gemm(shape.n, shape.d, shape.c, "nt")


def weighted_sum(shape: Shape) -> Gemm:
    """``r^T h``."""
    return Gemm(shape.c, shape.n, shape.d, "tn")


def sum_numbers(shape: Shape) -> int:
    return shape.c * (shape.d + 1)


def head(x: LastLayer) -> fastmeta.Head:
    return fastmeta.Head(x.head_weight, x.head_bias)


def losses(weight: Tensor, bias: Tensor, h: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(functional.linear(h, weight, bias), y, reduction="none")


def total_loss(weight: Tensor, bias: Tensor, h: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(functional.linear(h, weight, bias), y, reduction="sum")


def leaves(*tensors: Tensor) -> Iterator[Tensor]:
    """Copies that autograd differentiates with respect to."""
    return (t.clone().requires_grad_() for t in tensors)


def linear_module(weight: Tensor, bias: Tensor) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        module.weight.copy_(weight)
        module.bias.copy_(bias)
    return module


def _rows(x: LastLayer, rows: Tensor) -> LastLayer:
    """Those examples of a batch."""
    return replace(x, **{name: getattr(x, name)[rows] for name in ("features", "logits", "targets", "weights")})


def error_of(operator: Operator, x: LastLayer) -> Error:
    """Against the definition in float64, on rows or in blocks of rows that fit into memory."""
    definition = operator.eager[0][1]
    n, c = x.logits.shape
    device = x.features.device.type
    if operator.result_numbers is not sum_numbers:
        rows = checked_rows(n, c, device)
        truth = definition(*operator.arguments(_rows(x, rows).double()))
        # A peer may compute the first examples alone: compared where the truth has every row.
        return distance_to(truth, prefix=True) if len(rows) == n else distance_to(truth, rows)
    sums: list[Tensor] | None = None
    for rows in torch.arange(n, device=device).split(max(1, _CHUNK // c)):
        parts = definition(*operator.arguments(_rows(x, rows).double()))
        sums = list(parts) if sums is None else [total.add_(part) for total, part in zip(sums, parts, strict=True)]
    return distance_to(sums)


def build(operator: Operator, shape: Shape, dtype: torch.dtype, device: str) -> Workload:
    x, size = last_layer(shape, dtype, device), dtype.itemsize
    workload = workload_on_sets(
        operator.call,
        kernels.offered(operator.name, shape.c, device),
        operator.eager,
        lambda seed: operator.arguments(last_layer(shape, dtype, device, seed) if seed else x),
        lambda arguments: error_of(operator, x),
        size * operator.result_numbers(shape),
        operator.products(shape),
        dtype,
        device,
        operator.row_passes * shape.n * shape.c * size,
    )
    if operator.from_head or x.logits.numel() <= _LARGE:
        # On the CPU autograd and libraries are measured in float32 alone.
        every = bool(compile_modes(dtype, device))
        workload.variants.extend(peer for peer in operator.peers(x) if every or peer.role == "eager")
    return workload


def cases(operator: Operator, device: str) -> list[Case]:
    """Heads on a GPU and where C > D alone: the CPU computes their logits in slabs with the reference code."""
    shapes = [s for s in SHAPES[device] if not operator.from_head or (device == "cuda" and s.c > s.d)]
    suffix = ", head" * operator.from_head
    return [Case(operator.name, f"{s}{suffix}", partial(build, operator, s), shape=s) for s in shapes]
