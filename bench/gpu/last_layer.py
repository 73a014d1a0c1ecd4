"""The four last-layer operators: with logits at every shape, with the head in their place where C > D."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import fastmeta
from bench.case import TOLERANCE, Problem, Variant, bytes_of
from bench.gpu import forms, peers
from bench.gpu.case import GpuCase, checked_rows, distance_of_rows, distance_of_sums, number_of_sets, variants
from bench.gpu.floors import Gemm
from bench.inputs import LastLayer, Shape, last_layer
from bench.ops import hvp, label_gradient, last_layer_gradient, per_example_dot
from bench.roofline import Cost

SHAPES = (
    Shape(256, 128, 10),
    Shape(448, 128, 100),
    Shape(768, 512, 200),
    Shape(1024, 2048, 1000),
    Shape(4096, 2048, 1000),
    Shape(1024, 768, 30522),
    Shape(8192, 2048, 128256),
)
_CHUNK = 2**27  # entries of a block of the truth's logits


def ours_label_gradient(h: Tensor, f: Any, v: Tensor, b: Tensor, impl: str | None = None) -> Tensor:
    return fastmeta.ops.label_gradient(h, f, v, b, scale=label_gradient.SCALE, impl=impl)


def dot_from_head(h: Tensor, head: fastmeta.Head, y: Tensor, v: Tensor, b: Tensor) -> Tensor:
    z = functional.linear(h, v, b)
    p = functional.linear(h, head.weight, head.bias).softmax(-1)
    return (p * z).sum(-1) - z.gather(1, y.unsqueeze(1)).squeeze(1)


def label_gradient_from_head(h: Tensor, head: fastmeta.Head, v: Tensor, b: Tensor) -> Tensor:
    return label_gradient.eager(h, functional.linear(h, head.weight, head.bias), v, b)


def gradient_from_head(h: Tensor, head: fastmeta.Head, y: Tensor) -> tuple[Tensor, Tensor]:
    p = functional.linear(h, head.weight, head.bias).softmax(-1)
    r = p.scatter_add_(1, y.unsqueeze(1), p.new_full((len(y), 1), -1.0))
    return r.T @ h, r.sum(0)


@dataclass(frozen=True)
class Operator:
    """An operator as the benchmark calls it.

    Args:
        name: in ``fastmeta.ops``.
        call: fastmeta's, on the arguments and ``impl``.
        eager: closed forms on the same arguments; the first, in float64, is the truth.
        arguments: of one batch; of ``head_of(batch)`` in place of its logits where ``from_head``.
        products: those of a shape.
        by_row: a result row for each example; otherwise sums over the examples.
        peers: what else users have.
    """

    name: str
    call: Callable[..., Any]
    eager: tuple[tuple[str, Callable[..., Any]], ...]
    arguments: Callable[[LastLayer], tuple[Any, ...]]
    products: Callable[[Shape], tuple[Gemm, ...]]
    by_row: bool
    peers: Callable[[LastLayer], list[Variant]]
    from_head: bool = False


def head_of(x: LastLayer) -> fastmeta.Head:
    return fastmeta.Head(x.head_weight, x.head_bias)


def _tangent(shape: Shape) -> Gemm:
    return Gemm(shape.n, shape.d, shape.c, "nt")


def _sum(shape: Shape) -> Gemm:
    return Gemm(shape.c, shape.n, shape.d, "tn")


def _none(x: LastLayer) -> list[Variant]:
    return []


OPERATORS = (
    Operator(
        "per_example_dot",
        fastmeta.ops.per_example_dot,
        (("eager", per_example_dot.eager), ("eager (R V) h", per_example_dot.eager_reordered)),
        lambda x: (x.features, x.logits, x.targets, x.direction_weight, x.direction_bias),
        lambda shape: (_tangent(shape),),
        True,
        peers.per_example_dot,
    ),
    Operator(
        "label_gradient",
        ours_label_gradient,
        (("eager", label_gradient.eager), ("eager addmm, vecdot", label_gradient.eager_vecdot)),
        lambda x: (x.features, x.logits, x.direction_weight, x.direction_bias),
        lambda shape: (_tangent(shape),),
        True,
        peers.label_gradient,
    ),
    Operator(
        "last_layer_gradient",
        fastmeta.ops.last_layer_gradient,
        (("eager", last_layer_gradient.eager),),
        lambda x: (x.features, x.logits, x.targets, x.weights),
        lambda shape: (_sum(shape),),
        False,
        peers.last_layer_gradient,
    ),
    Operator(
        "hessian_vector_product",
        fastmeta.ops.hessian_vector_product,
        (("eager", hvp.eager),),
        lambda x: (x.features, x.logits, x.direction_weight, x.direction_bias),
        lambda shape: (_tangent(shape), _sum(shape)),
        False,
        peers.hessian_vector_product,
    ),
    # With classes as targets, as a language model has them.
    Operator(
        "per_example_dot",
        fastmeta.ops.per_example_dot,
        (("eager", dot_from_head),),
        lambda x: (x.features, head_of(x), x.targets.argmax(-1), x.direction_weight, x.direction_bias),
        lambda shape: 2 * (_tangent(shape),),
        True,
        _none,
        from_head=True,
    ),
    Operator(
        "label_gradient",
        ours_label_gradient,
        (("eager", label_gradient_from_head),),
        lambda x: (x.features, head_of(x), x.direction_weight, x.direction_bias),
        lambda shape: 2 * (_tangent(shape),),
        True,
        _none,
        from_head=True,
    ),
    Operator(
        "last_layer_gradient",
        fastmeta.ops.last_layer_gradient,
        (("eager", gradient_from_head),),
        lambda x: (x.features, head_of(x), x.targets.argmax(-1)),
        lambda shape: (_tangent(shape), _sum(shape)),
        False,
        peers.linear_cross_entropy,
        from_head=True,
    ),
)


def _rows(x: LastLayer, rows: Tensor) -> LastLayer:
    """Those examples of a batch."""
    return replace(
        x,
        features=x.features[rows],
        logits=x.logits[rows],
        targets=x.targets[rows],
        weights=x.weights[rows],
    )


def error_of(operator: Operator, x: LastLayer) -> Callable[[Any], float]:
    """Against the definition in float64, on rows or in blocks of rows that fit into memory."""
    definition = operator.eager[0][1]
    n, c = x.logits.shape
    device = x.features.device.type
    if operator.by_row:
        rows = checked_rows(n, c, device)
        return distance_of_rows(definition(*operator.arguments(_rows(x, rows).double())), rows)
    sums: list[Tensor] | None = None
    for rows in torch.arange(n, device=device).split(max(1, _CHUNK // c)):
        parts = definition(*operator.arguments(_rows(x, rows).double()))
        sums = list(parts) if sums is None else [total.add_(part) for total, part in zip(sums, parts, strict=True)]
    assert sums is not None
    return distance_of_sums(sums)


def _tensors(arguments: tuple[Any, ...]) -> list[Tensor]:
    found: list[Tensor] = []
    for argument in arguments:
        found += [argument] if isinstance(argument, Tensor) else [t for t in argument if t is not None]
    return found


def build(operator: Operator, shape: Shape, dtype: torch.dtype, device: str) -> Problem:
    n, d, c = shape
    x = last_layer(shape, dtype, device)
    moved = bytes_of(*_tensors(operator.arguments(x)))
    count = number_of_sets(moved, device)
    sets = [operator.arguments(x)]
    sets += [operator.arguments(last_layer(shape, dtype, device, seed)) for seed in range(1, count)]
    written = (n if operator.name == "per_example_dot" else n * c) if operator.by_row else c * (d + 1)
    moved += written * x.features.element_size()
    offered = forms.offered(operator.name, c, device)
    cost = Cost(sum(gemm.flops for gemm in operator.products(shape)), moved, count * moved)
    return Problem(
        variants(operator.call, offered, operator.eager, sets) + operator.peers(x),
        error_of(operator, x),
        cost,
        TOLERANCE[dtype],
        n,
    )


CASES = [
    GpuCase(
        operator.name,
        f"{shape}, head" if operator.from_head else str(shape),
        partial(build, operator, shape),
        operator.products(shape),
        shape=shape,
        from_head=operator.from_head,
    )
    for shape in SHAPES
    for operator in OPERATORS
    if not operator.from_head or shape.c > shape.d
]
