"""How an inner step's pull on the logits changes with the labels, ``scale t(h_i V^T + b)``."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import fastmeta
from bench.case import Variant
from bench.inputs import LastLayer
from bench.ops.last_layer import FORWARD, Operator, head, leaves, tangent, total_loss

SCALE = 0.1


def ours(h: Tensor, f: Any, v: Tensor, b: Tensor, impl: str | None = None) -> Tensor:
    return fastmeta.ops.label_gradient(h, f, v, b, scale=SCALE, impl=impl)


def eager(h: Tensor, f: Tensor, v: Tensor, b: Tensor) -> Tensor:
    z = functional.linear(h, v, b)
    return (z - (f.softmax(-1) * z).sum(-1, keepdim=True)) * SCALE


def vecdot(h: Tensor, f: Tensor, v: Tensor, b: Tensor) -> Tensor:
    z = torch.addmm(b, h, v.T, beta=SCALE, alpha=SCALE)
    return z - torch.linalg.vecdot(f.softmax(-1), z).unsqueeze(-1)


def from_head(h: Tensor, head: Any, v: Tensor, b: Tensor) -> Tensor:
    return eager(h, functional.linear(h, head.weight, head.bias), v, b)


def peers(x: LastLayer) -> list[Variant]:
    v, b = x.direction_weight, x.direction_bias
    weight, bias, targets = leaves(x.head_weight, x.head_bias, x.targets)

    def jvp() -> Tensor:
        def log_probabilities(w: Tensor, a: Tensor) -> Tensor:
            return functional.linear(x.features, w, a).log_softmax(-1)

        return SCALE * torch.func.jvp(log_probabilities, (x.head_weight, x.head_bias), (v, b))[1]

    def double_backward() -> Tensor:
        """The definition: how the step of the inner loss changes with its targets."""
        loss = total_loss(weight, bias, x.features, targets)
        grads = torch.autograd.grad(loss, (weight, bias), create_graph=True)
        return torch.autograd.grad(grads, targets, grad_outputs=(-SCALE * v, -SCALE * b))[0]

    return [
        Variant("func.jvp", jvp, note=FORWARD),
        Variant("double backward", double_backward, grad=True, graph=False, note=FORWARD),
    ]


ON_LOGITS = Operator(
    "label_gradient",
    ours,
    (("eager", eager), ("eager addmm, vecdot", vecdot)),
    lambda x: (x.features, x.logits, x.direction_weight, x.direction_bias),
    lambda shape: (tangent(shape),),
    3,  # z, f, the result
    lambda shape: shape.n * shape.c,
    peers,
)
FROM_HEAD = Operator(
    "label_gradient",
    ours,
    (("eager", from_head),),
    lambda x: (x.features, head(x), x.direction_weight, x.direction_bias),
    lambda shape: 2 * (tangent(shape),),
    3,  # f, z, the result
    lambda shape: shape.n * shape.c,
    from_head=True,
)
