"""The Hessian of the last layer times a vector, ``c(h V^T + b)^T h``."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import fastmeta
from bench.case import Variant, compiled
from bench.inputs import LastLayer
from bench.ops.last_layer import (
    BACKWARD,
    Operator,
    leaves,
    linear_module,
    sum_numbers,
    tangent,
    total_loss,
    weighted_sum,
)

try:
    import curvlinops
except ImportError:
    curvlinops = None

Sums = tuple[Tensor, ...]  # [C, D], [C]


def eager(h: Tensor, f: Tensor, v: Tensor, b: Tensor) -> Sums:
    return eager_cached(h, f.softmax(-1), v, b)


def eager_cached(h: Tensor, p: Tensor, v: Tensor, b: Tensor) -> Sums:
    """As inside a solver, which has the probabilities from its first product."""
    z = functional.linear(h, v, b)
    c = p * (z - (p * z).sum(-1, keepdim=True))
    return c.T @ h, c.sum(0)


def peers(x: LastLayer) -> list[Variant]:
    h, y, v, b = x.features, x.targets, x.direction_weight, x.direction_bias
    p, on_cpu = x.logits.softmax(-1), h.device.type == "cpu"
    weight, bias = leaves(x.head_weight, x.head_bias)

    def gradient() -> Sums:
        return torch.autograd.grad(total_loss(weight, bias, h, y), (weight, bias), create_graph=True)

    def double_backward() -> Sums:
        return torch.autograd.grad(gradient(), (weight, bias), grad_outputs=(v, b))

    def jvp_of_grad() -> Sums:
        grad = torch.func.grad(lambda w, a: total_loss(w, a, h, y), argnums=(0, 1))
        return torch.func.jvp(grad, (x.head_weight, x.head_bias), (v, b))[1]

    with torch.enable_grad():
        kept = partial(torch.autograd.grad, gradient(), (weight, bias), grad_outputs=(v, b), retain_graph=True)
    variants = [
        Variant("eager, p cached", partial(eager_cached, h, p, v, b), "eager"),
        *([Variant("torch.compile, p cached", partial(compiled(eager_cached), h, p, v, b), "compile")] * on_cpu),
        Variant("double backward", double_backward, grad=True, graph=False, note=BACKWARD),
        Variant("double backward, graph kept", kept, grad=True, graph=False),
        Variant("func.jvp(grad)", jvp_of_grad, note=BACKWARD),
    ]
    if curvlinops is not None:
        hessian = hessian_operator(h, y, x.head_weight, x.head_bias, "sum")
        variants.append(Variant("curvlinops", lambda: hessian @ [v, b], grad=True, graph=False, note=BACKWARD))
    return variants


def hessian_operator(features: Tensor, targets: Tensor, weight: Tensor, bias: Tensor, reduction: str) -> Any:
    """The Hessian of the cross-entropy in the last layer, as a linear operator of curvlinops."""
    module = linear_module(weight, bias)
    loss = nn.CrossEntropyLoss(reduction=reduction)
    # The operator would otherwise run every product twice at construction.
    return curvlinops.HessianLinearOperator(
        module, loss, list(module.parameters()), [(features, targets)], check_deterministic=False
    )


ON_LOGITS = Operator(
    "hessian_vector_product",
    fastmeta.ops.hessian_vector_product,
    (("eager", eager),),
    lambda x: (x.features, x.logits, x.direction_weight, x.direction_bias),
    lambda shape: (tangent(shape), weighted_sum(shape)),
    3,  # z, f, c
    sum_numbers,
    peers,
)
