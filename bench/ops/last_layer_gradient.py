"""The gradient of the last layer, ``(w r)^T h`` and ``sum w r``."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import fastmeta
from bench.case import Variant
from bench.inputs import LastLayer
from bench.ops.last_layer import FORWARD, Operator, head, leaves, losses, sum_numbers, tangent, weighted_sum

try:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
except Exception:  # not installed, or without its own dependencies
    LigerFusedLinearCrossEntropyLoss = None

Sums = tuple[Tensor, ...]  # [C, D], [C]


def eager(h: Tensor, f: Tensor, y: Tensor, w: Tensor) -> Sums:
    r = (f.softmax(-1) - y) * w.unsqueeze(-1)
    return r.T @ h, r.sum(0)


def from_head(h: Tensor, head: Any, y: Tensor) -> Sums:
    p = functional.linear(h, head.weight, head.bias).softmax(-1)
    r = p.scatter_add_(1, y.unsqueeze(1), p.new_full((len(y), 1), -1.0))
    return r.T @ h, r.sum(0)


def peers(x: LastLayer) -> list[Variant]:
    weight, bias, logits = leaves(x.head_weight, x.head_bias, x.logits)

    def to_logits() -> Sums:
        loss = x.weights @ functional.cross_entropy(logits, x.targets, reduction="none")
        (r,) = torch.autograd.grad(loss, logits)
        return r.T @ x.features, r.sum(0)

    def autograd() -> Sums:
        return torch.autograd.grad(x.weights @ losses(weight, bias, x.features, x.targets), (weight, bias))

    return [
        Variant("autograd to the logits", to_logits, grad=True),
        Variant("autograd", autograd, grad=True, note=FORWARD),
    ]


def liger(x: LastLayer) -> list[Variant]:
    """Liger's fused linear cross-entropy: the loss, and its gradient in the head, which it takes in the forward."""
    if LigerFusedLinearCrossEntropyLoss is None or x.features.device.type != "cuda":
        return []
    weight, bias, h = leaves(x.head_weight, x.head_bias, x.features)
    loss, y = LigerFusedLinearCrossEntropyLoss(reduction="sum"), x.targets.argmax(-1)

    def call() -> Sums:
        # With the features' gradient, as a training step asks for it; it is no part of the result.
        return torch.autograd.grad(loss(weight, h, y, bias), (weight, bias, h), allow_unused=True)[:2]

    return [Variant("Liger", call, grad=True, graph=False, note="computes the loss and the features' gradient as well")]


ON_LOGITS = Operator(
    "last_layer_gradient",
    fastmeta.ops.last_layer_gradient,
    (("eager", eager),),
    lambda x: (x.features, x.logits, x.targets, x.weights),
    lambda shape: (weighted_sum(shape),),
    3,  # f, y, r
    sum_numbers,
    peers,
)
FROM_HEAD = Operator(
    "last_layer_gradient",
    fastmeta.ops.last_layer_gradient,
    (("eager", from_head),),
    lambda x: (x.features, head(x), x.targets.argmax(-1)),
    lambda shape: (tangent(shape), weighted_sum(shape)),
    2,  # f, r
    sum_numbers,
    liger,
    from_head=True,
)
