"""Gradient of a weighted sum of per-example losses with respect to the last linear layer."""

from typing import Any

from torch import Tensor

from fastmeta import checks, losses
from fastmeta.capture import Head
from fastmeta.dispatch import Operator, in_own_dtype, unnamed
from fastmeta.losses import LOSSES
from fastmeta.ops import _last_layer


def _fake(features: Tensor, logits: Tensor | None, head_weight: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    num_classes = _last_layer.num_classes(logits, head_weight)
    return features.new_empty(num_classes, features.shape[1]), features.new_empty(num_classes)


OPERATOR = Operator("last_layer_gradient", numbers=1, triton="last_layer_gradient", fake=_fake)


@in_own_dtype
def last_layer_gradient_reference(
    features: Tensor,  # [N, D]
    logits: Tensor,  # [N, C]
    targets: Tensor,  # [N, C]
    weights: Tensor | None,  # [N]
    loss: str,
) -> tuple[Tensor, Tensor]:  # [C, D], [C]
    """``G = R^T h``, ``g_b = sum_i R_i`` with ``R = w r``."""
    r = losses.residual(logits, targets, loss)
    if weights is not None:
        r = weights.unsqueeze(-1) * r
    return r.T @ features, r.sum(0)


def last_layer_gradient(
    features: Tensor,
    logits: Tensor | Head,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    loss: str = "cross_entropy",
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Gradient of ``sum_i w_i l(f_i, y_i)`` with respect to the last layer's weight and bias.

    .. math:: G = \sum_i w_i r_i h_i^T, \qquad g_b = \sum_i w_i r_i, \qquad r = \partial l / \partial f

    Divide the weights by N for the gradient of a mean.

    Args:
        features: input of the last layer, ``[N, D]``.
        logits: its output ``[N, C]``, or a :class:`fastmeta.Head` from which it is computed inside.
        targets: probabilities ``[N, C]`` or int64 classes ``[N]``; class k is the row with a 1 at k, for every loss.
        weights: example weights ``[N]``; None means 1.
        loss: one of :data:`fastmeta.losses.LOSSES`.
        impl: implementation to use; see :func:`fastmeta.use_impl`.

    Returns:
        Gradient of the weight ``[C, D]`` and of the bias ``[C]``.

    Raises:
        ValueError: a shape or the loss does not fit, or a class is out of range.
        TypeError: dtypes are not floating or not the same.
        RuntimeError: the named ``impl`` is not available.

    >>> import torch
    >>> weight, bias = last_layer_gradient(torch.ones(1, 3), torch.zeros(1, 2), torch.tensor([0]))
    >>> weight.tolist(), bias.tolist()
    ([[-0.5, -0.5, -0.5], [0.5, 0.5, 0.5]], [-0.5, 0.5])
    """
    f, head_weight, head_bias = _last_layer.split(logits)
    tensors = features, f, head_weight, head_bias, targets, weights
    arguments = (*tensors, LOSSES.get(loss))
    if unnamed(impl):
        result = OPERATOR.entry(*arguments)
        if result is not NotImplemented:
            return result
    kernel = OPERATOR.select(impl, *tensors)

    def check() -> None:
        checks.loss_code(loss)
        h, num_classes = _last_layer.check_outputs(features, logits)
        checks.targets(targets, h, num_classes)
        _last_layer.check_weights(h, weights)

    if kernel is not None:
        return checks.run(kernel, arguments, check)
    check()
    f = logits.logits(features) if isinstance(logits, Head) else logits
    y = losses.as_probabilities(targets, f.shape[1], f.dtype)
    return last_layer_gradient_reference(features, f, y, weights, loss)
