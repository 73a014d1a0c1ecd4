"""What users have for the last-layer operators besides closed forms."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.case import Variant
from bench.gpu.case import rotating
from bench.inputs import LastLayer
from bench.ops import hvp
from bench.ops import label_gradient as labels
from bench.ops import last_layer_gradient as gradients
from bench.ops import per_example_dot as dots

try:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
except Exception:  # absent, or present without what it needs itself
    LigerFusedLinearCrossEntropyLoss = None

_FORWARD = "with the head's forward"
_LARGE = 2**24  # logits from which peers that keep many copies of them are left out


def fits(num_bytes: float, device: str) -> bool:
    """Whether so many bytes are free, and few enough to be touched in a benchmark's time."""
    return num_bytes < (0.9 * torch.cuda.mem_get_info()[0] if device == "cuda" else 2**28)


def per_example_dot(x: LastLayer) -> list[Variant]:
    n, c = x.logits.shape
    gradients_bytes = n * c * x.features.shape[1] * x.features.element_size()
    if not fits(2.5 * gradients_bytes, x.features.device.type):  # the gradients, and a copy in another order
        return []
    arguments = (x.features, x.head_weight, x.head_bias, x.targets, x.direction_weight, x.direction_bias)
    return [rotating("vmap(grad)", dots.vmap_grad, [arguments], note=_FORWARD)]


def label_gradient(x: LastLayer) -> list[Variant]:
    if x.logits.numel() > _LARGE:
        return []
    arguments = (x.features, x.head_weight, x.head_bias, x.direction_weight, x.direction_bias)
    return [rotating("func.jvp", labels.func_jvp, [arguments], note=_FORWARD)]


def last_layer_gradient(x: LastLayer) -> list[Variant]:
    if x.logits.numel() > _LARGE:
        return []
    logits = x.logits.clone().requires_grad_()
    arguments = (x.features, logits, x.targets, x.weights)
    return [rotating("autograd to the logits", gradients.autograd_to_logits, [arguments], grad=True)]


def hessian_vector_product(x: LastLayer) -> list[Variant]:
    if x.logits.numel() > _LARGE:
        return []
    weight, bias = (t.clone().requires_grad_() for t in (x.head_weight, x.head_bias))
    arguments = (x.features, weight, bias, x.targets, x.direction_weight, x.direction_bias)
    note = "with the head's forward and backward"
    return [rotating("double backward", hvp.double_backward, [arguments], grad=True, graph=False, note=note)]


def linear_cross_entropy(x: LastLayer) -> list[Variant]:
    """Liger's fused linear cross-entropy: the loss, and its gradient in the head."""
    if LigerFusedLinearCrossEntropyLoss is None:
        return []
    weight, bias = (t.clone().requires_grad_() for t in (x.head_weight, x.head_bias))
    call = partial(_liger, LigerFusedLinearCrossEntropyLoss(reduction="sum"), weight, bias)
    arguments = (x.features, x.targets.argmax(-1))
    return [rotating("Liger", call, [arguments], grad=True, graph=False, note="computes the loss as well")]


def _liger(loss: Any, weight: Tensor, bias: Tensor, h: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(weight, h, y, bias), (weight, bias))
