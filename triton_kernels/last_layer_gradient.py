"""Gradient of the last layer: the sums of :mod:`._gradient` with ``R = w r``."""

from torch import Tensor

from fastmeta import checks
from fastmeta.triton_kernels import _arguments, _gradient, _products
from fastmeta.triton_kernels._launch import INTERPRETED, MISSING, Plans, layout, on_device, precision

_PLANS: Plans[_gradient.Fused | _gradient.Slabs | None] = Plans()


def _plan(
    features: Tensor,
    logits: Tensor | None,
    head_weight: Tensor | None,
    head_bias: Tensor | None,
    targets: Tensor,
    weights: Tensor | None,
    loss: int,
) -> _gradient.Fused | _gradient.Slabs | None:
    _arguments.loss(loss)
    n, d, c = _arguments.outputs(features, logits, head_weight, head_bias)
    checks.targets(targets, features, c)
    _arguments.weights(features, weights)
    if n == 0 or c == 0:
        return None
    return _gradient.plan(
        _gradient.Problem(
            "last_layer_gradient", n, d, c, features.dtype, loss,
            curved=False, classes=targets.dim() == 1, product=logits is None, with_bias=True,
            multiple=_gradient.multiple(c, logits, targets), aligned=_products.aligned(d, features, head_weight),
        )
    )  # fmt: skip


@on_device
def last_layer_gradient(
    features: Tensor,
    logits: Tensor | None,
    head_weight: Tensor | None,
    head_bias: Tensor | None,
    targets: Tensor,
    weights: Tensor | None,
    loss: int,
) -> tuple[Tensor, Tensor]:
    """See :func:`fastmeta.ops.last_layer_gradient`. ``[C, D]``, ``[C]``."""
    tensors = (features, logits, head_weight, head_bias, targets, weights)
    key = (features.device, loss, precision(features.dtype), *layout(*tensors))
    plan = _PLANS.get(key, MISSING)
    if plan is MISSING:
        plan = _PLANS.keep(key, _plan(*tensors, loss))
    elif INTERPRETED:
        checks.targets(targets, features, _num_classes(logits, head_weight))  # in range: on the CPU no wait
    c, d = _num_classes(logits, head_weight), features.shape[1]
    weight = features.new_empty((c, d))
    bias = features.new_empty(c)
    if plan is None:
        return weight.zero_(), bias.zero_()
    plan(_gradient.Operands(features, logits, head_weight, head_bias, targets, weights), None, 0.0, weight, bias)
    return weight, bias


def _num_classes(logits: Tensor | None, head_weight: Tensor | None) -> int:
    return logits.shape[1] if logits is not None else head_weight.shape[0]  # type: ignore[union-attr]
