"""Hessian-vector product of the last layer."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

import fastmeta
from bench import optional_peers
from bench.case import TOLERANCE, Case, Problem, Variant, bytes_of, closed_forms, compiled, distance_to
from bench.inputs import SHAPES, LastLayer, Shape, last_layer
from bench.roofline import Cost

OPERATOR = "hessian_vector_product"


def eager(h: Tensor, f: Tensor, v: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return eager_cached(h, f.softmax(-1), v, b)


def eager_cached(h: Tensor, p: Tensor, v: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """As inside a solver, which has the probabilities from its first product."""
    z = functional.linear(h, v, b)
    c = p * (z - (p * z).sum(-1, keepdim=True))
    return c.T @ h, c.sum(0)


def _gradient(weight: Tensor, bias: Tensor, h: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    loss = optional_peers.cross_entropy_sum(functional.linear(h, weight, bias), y)
    return torch.autograd.grad(loss, (weight, bias), create_graph=True)


def double_backward(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor, v: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(_gradient(weight, bias, h, y), (weight, bias), grad_outputs=(v, b))


def kept_graph(grads: tuple[Tensor, ...], weight: Tensor, bias: Tensor, v: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(grads, (weight, bias), grad_outputs=(v, b), retain_graph=True)


def func_jvp(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor, v: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    def loss(w: Tensor, a: Tensor) -> Tensor:
        return optional_peers.cross_entropy_sum(functional.linear(h, w, a), y)

    return torch.func.jvp(torch.func.grad(loss, argnums=(0, 1)), (weight, bias), (v, b))[1]


def _peers(x: LastLayer) -> list[Variant]:
    h, y, v, b = x.features, x.targets, x.direction_weight, x.direction_bias
    weight, bias = (t.clone().requires_grad_() for t in (x.head_weight, x.head_bias))
    with torch.enable_grad():
        grads = _gradient(weight, bias, h, y)
    forward = "with the head's forward and backward"
    variants = [
        Variant("double backward", partial(double_backward, h, weight, bias, y, v, b), grad=True, note=forward),
        Variant("double backward, graph kept", partial(kept_graph, grads, weight, bias, v, b), grad=True),
        Variant("func.jvp(grad)", partial(func_jvp, h, x.head_weight, x.head_bias, y, v, b), note=forward),
    ]
    if optional_peers.curvlinops is not None:
        hessian = optional_peers.hessian_operator(h, y, x.head_weight, x.head_bias, "sum")
        variants.append(Variant("curvlinops", lambda: hessian @ [v, b], grad=True, note=forward))
    return variants


def build(shape: Shape, dtype: torch.dtype) -> Problem:
    x = last_layer(shape, dtype)
    h, v, b = x.features, x.direction_weight, x.direction_bias
    full = dtype == torch.float32
    variants = closed_forms(fastmeta.ops.hessian_vector_product, [("eager", eager)], (h, x.logits, v, b), compile=full)
    p = x.logits.softmax(-1)
    variants.append(Variant("eager, p cached", partial(eager_cached, h, p, v, b), "eager"))
    if full:
        variants.append(Variant("torch.compile, p cached", compiled(eager_cached, h, p, v, b), "compile"))
        variants += _peers(x)
    exact = x.double()
    return Problem(
        variants,
        distance_to(eager(exact.features, exact.logits, exact.direction_weight, exact.direction_bias)),
        Cost(4 * shape.n * shape.d * shape.c, bytes_of(h, x.logits, v, b, v, b)),
        TOLERANCE[dtype],
    )


CASES = [Case(OPERATOR, str(shape), partial(build, shape)) for shape in SHAPES]
