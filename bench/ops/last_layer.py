"""The four last-layer operators: with logits at every shape, and on a GPU with the head in their place where C > D."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastmeta
from bench import closed_forms, kernels, peers
from bench.case import (
    TOLERANCE,
    Case,
    Problem,
    Variant,
    bytes_of,
    checked_rows,
    compile_modes,
    distance_to,
    lazily,
    number_of_sets,
    variants,
)
from bench.floors import Cost, Gemm
from bench.inputs import SHAPES, LastLayer, Shape, last_layer

_CHUNK = 2**27  # entries of a block of the truth's logits


@dataclass(frozen=True)
class Operator:
    """An operator as the benchmark calls it.

    Args:
        name: in ``fastmeta.ops``.
        call: fastmeta's, on the arguments and ``impl``.
        eager: closed forms on the same arguments; the first, in float64, is the truth.
        arguments: of one batch; of ``head_of(batch)`` in place of its logits where ``from_head``.
        products: those of a shape.
        row_passes: matrices ``[N, C]`` that are read or written between those products.
        by_row: a result row for each example; otherwise sums over the examples.
        peers: what else users have.
        from_head: whether the logits are recomputed.
    """

    name: str
    call: Callable[..., Any]
    eager: tuple[tuple[str, Callable[..., Any]], ...]
    arguments: Callable[[LastLayer], tuple[Any, ...]]
    products: Callable[[Shape], tuple[Gemm, ...]]
    row_passes: int
    by_row: bool
    peers: Callable[[LastLayer], list[Variant]]
    from_head: bool = False


def _label_gradient(h: Tensor, f: Any, v: Tensor, b: Tensor, impl: str | None = None) -> Tensor:
    return fastmeta.ops.label_gradient(h, f, v, b, scale=closed_forms.SCALE, impl=impl)


def _head(x: LastLayer) -> fastmeta.Head:
    return fastmeta.Head(x.head_weight, x.head_bias)


def _tangent(shape: Shape) -> Gemm:
    return Gemm(shape.n, shape.d, shape.c, "nt")


def _sum(shape: Shape) -> Gemm:
    return Gemm(shape.c, shape.n, shape.d, "tn")


OPERATORS = (
    Operator(
        "per_example_dot",
        fastmeta.ops.per_example_dot,
        (("eager", closed_forms.per_example_dot), ("eager (R V) h", closed_forms.per_example_dot_reordered)),
        lambda x: (x.features, x.logits, x.targets, x.direction_weight, x.direction_bias),
        lambda shape: (_tangent(shape),),
        3,  # z, f, y
        True,
        peers.per_example_dot,
    ),
    Operator(
        "label_gradient",
        _label_gradient,
        (("eager", closed_forms.label_gradient), ("eager addmm, vecdot", closed_forms.label_gradient_vecdot)),
        lambda x: (x.features, x.logits, x.direction_weight, x.direction_bias),
        lambda shape: (_tangent(shape),),
        3,  # z, f, the result
        True,
        peers.label_gradient,
    ),
    Operator(
        "last_layer_gradient",
        fastmeta.ops.last_layer_gradient,
        (("eager", closed_forms.last_layer_gradient),),
        lambda x: (x.features, x.logits, x.targets, x.weights),
        lambda shape: (_sum(shape),),
        3,  # f, y, r
        False,
        peers.last_layer_gradient,
    ),
    Operator(
        "hessian_vector_product",
        fastmeta.ops.hessian_vector_product,
        (("eager", closed_forms.hessian_vector_product),),
        lambda x: (x.features, x.logits, x.direction_weight, x.direction_bias),
        lambda shape: (_tangent(shape), _sum(shape)),
        3,  # z, f, c
        False,
        peers.hessian_vector_product,
    ),
    # With classes as targets, as a language model has them.
    Operator(
        "per_example_dot",
        fastmeta.ops.per_example_dot,
        (("eager", closed_forms.dot_from_head),),
        lambda x: (x.features, _head(x), x.targets.argmax(-1), x.direction_weight, x.direction_bias),
        lambda shape: 2 * (_tangent(shape),),
        2,  # f, z
        True,
        lambda x: [],
        from_head=True,
    ),
    Operator(
        "label_gradient",
        _label_gradient,
        (("eager", closed_forms.label_gradient_from_head),),
        lambda x: (x.features, _head(x), x.direction_weight, x.direction_bias),
        lambda shape: 2 * (_tangent(shape),),
        3,  # f, z, the result
        True,
        lambda x: [],
        from_head=True,
    ),
    Operator(
        "last_layer_gradient",
        fastmeta.ops.last_layer_gradient,
        (("eager", closed_forms.gradient_from_head),),
        lambda x: (x.features, _head(x), x.targets.argmax(-1)),
        lambda shape: (_tangent(shape), _sum(shape)),
        2,  # f, r
        False,
        peers.linear_cross_entropy,
        from_head=True,
    ),
)


def _rows(x: LastLayer, rows: Tensor) -> LastLayer:
    """Those examples of a batch."""
    per_example = ("features", "logits", "targets", "weights")
    return replace(x, **{name: getattr(x, name)[rows] for name in per_example})


def error_of(operator: Operator, x: LastLayer) -> Callable[[Any], float]:
    """Against the definition in float64, on rows or in blocks of rows that fit into memory."""
    definition = operator.eager[0][1]
    n, c = x.logits.shape
    device = x.features.device.type
    if operator.by_row:
        rows = checked_rows(n, c, device)
        truth = definition(*operator.arguments(_rows(x, rows).double()))
        # All rows, or so many that no peer has fewer: peers that measure a slice do so where all are checked.
        return distance_to(truth, prefix=True) if len(rows) == n else distance_to(truth, rows)
    sums: list[Tensor] | None = None
    for rows in torch.arange(n, device=device).split(max(1, _CHUNK // c)):
        parts = definition(*operator.arguments(_rows(x, rows).double()))
        sums = list(parts) if sums is None else [total.add_(part) for total, part in zip(sums, parts, strict=True)]
    return distance_to(sums)


def _tensors(arguments: tuple[Any, ...]) -> list[Tensor]:
    found: list[Tensor] = []
    for argument in arguments:
        found += [argument] if isinstance(argument, Tensor) else [t for t in argument if t is not None]
    return found


def build(operator: Operator, shape: Shape, dtype: torch.dtype, device: str) -> Problem:
    n, d, c = shape
    x = last_layer(shape, dtype, device)
    size = x.features.element_size()
    moved = bytes_of(*_tensors(operator.arguments(x)))
    count = number_of_sets(moved, device)
    sets = [operator.arguments(x)]
    sets += [operator.arguments(last_layer(shape, dtype, device, seed)) for seed in range(1, count)]
    moved += size * ((n if operator.name == "per_example_dot" else n * c) if operator.by_row else c * (d + 1))
    products = operator.products(shape)
    forms, modes = kernels.offered(operator.name, c, device), compile_modes(dtype, device)
    return Problem(
        # Peers that are no closed forms: on the CPU in float32 alone.
        variants(operator.call, forms, operator.eager, sets, modes)
        + [peer for peer in operator.peers(x) if modes or peer.role == "eager"],
        lazily(lambda: error_of(operator, x)),
        Cost(sum(gemm.flops for gemm in products), moved, count * moved, products, operator.row_passes * n * c * size),
        TOLERANCE[dtype],
        n,
    )


def cases(device: str) -> list[Case]:
    """Heads on a GPU alone: on the CPU they are the reference's slabs."""
    return [
        Case(
            operator.name,
            f"{shape}, head" if operator.from_head else str(shape),
            partial(build, operator, shape),
            shape=shape,
            from_head=operator.from_head,
        )
        for operator in OPERATORS
        for shape in SHAPES[device]
        if not operator.from_head or (device == "cuda" and shape.c > shape.d)
    ]
