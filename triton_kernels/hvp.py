"""Hessian-vector product of the last layer: the sums of :mod:`._gradient` with ``R = w c(z)``."""

import torch
from torch import Tensor

from fastmeta.triton_kernels import _arguments, _gradient, _products
from fastmeta.triton_kernels._launch import MISSING, Plans, layout, on_device, precision

_PLANS: Plans[_gradient.Fused | _gradient.Slabs | None] = Plans()


def _plan(
    features: Tensor,
    logits: Tensor,
    direction_weight: Tensor,
    direction_bias: Tensor | None,
    weights: Tensor | None,
    loss: int,
) -> _gradient.Fused | _gradient.Slabs | None:
    _arguments.loss(loss)
    n, d, c = _arguments.outputs(features, logits, None, None)
    _arguments.direction(features, c, direction_weight, direction_bias)
    _arguments.weights(features, weights)
    if n == 0 or c == 0:
        return None
    return _gradient.plan(
        _gradient.Problem(
            "hessian_vector_product", n, d, c, features.dtype, loss,
            curved=True, classes=False, product=True, with_bias=direction_bias is not None,
            multiple=_gradient.multiple(c, None, logits), aligned=_products.aligned(d, features, direction_weight),
        )
    )  # fmt: skip


@on_device
def hessian_vector_product(
    features: Tensor,
    logits: Tensor,
    direction_weight: Tensor,
    direction_bias: Tensor | None,
    weights: Tensor | None,
    loss: int,
    damping: float,
) -> tuple[Tensor, Tensor]:
    """See :func:`fastmeta.ops.hessian_vector_product`. ``[C, D]``, and ``[C]`` or ``[0]``."""
    # Compared, not checked by name: the words cost more than the launch.
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping must be finite and >= 0, got {damping}")
    tensors = (features, logits, direction_weight, direction_bias, weights)
    damped = damping != 0
    key = (features.device, loss, damped, precision(features.dtype), *layout(*tensors))
    plan = _PLANS.get(key, MISSING)
    if plan is MISSING:
        plan = _PLANS.keep(key, _plan(*tensors, loss))
    c, d = direction_weight.shape
    weight = features.new_empty((c, d))
    bias = features.new_empty(0 if direction_bias is None else c)
    if plan is None:
        torch.mul(direction_weight, damping, out=weight)
        if direction_bias is not None:
            torch.mul(direction_bias, damping, out=bias)
        return weight, bias
    given = _gradient.Operands(features, None, direction_weight, direction_bias, logits, weights)
    plan(given, direction_weight if damped else None, float(damping), weight, bias)
    return weight, bias
