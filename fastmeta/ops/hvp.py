"""Hessian-vector product of the last layer."""

from typing import Any

from torch import Tensor

from fastmeta import checks, losses
from fastmeta.dispatch import Operator, in_own_dtype, unnamed
from fastmeta.losses import LOSSES
from fastmeta.ops import _last_layer


def _fake(
    features: Tensor, logits: Tensor, targets: Any, direction_weight: Tensor, direction_bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    bias = 0 if direction_bias is None else direction_weight.shape[0]
    return features.new_empty(direction_weight.shape), features.new_empty(bias)


OPERATOR = Operator("hessian_vector_product", numbers=2, triton="hvp", fake=_fake)


@in_own_dtype
def hessian_vector_product_reference(
    features: Tensor,  # [N, D]
    logits: Tensor,  # [N, C]
    direction_weight: Tensor,  # [C, D]
    direction_bias: Tensor | None,  # [C]
    weights: Tensor | None,  # [N]
    loss: str,
    damping: float,
    targets: Tensor | None = None,  # [N, C]
) -> tuple[Tensor, Tensor | None]:  # [C, D], [C]
    """``(w c(z))^T h + damping V`` and the bias's ``sum_i w_i c(z_i) + damping b``."""
    z = _last_layer.logit_tangent(features, direction_weight, direction_bias)
    c = losses.curvature(logits, z, loss, targets)
    if weights is not None:
        c = weights.unsqueeze(-1) * c
    bias = None if direction_bias is None else c.sum(0) + damping * direction_bias
    return c.T @ features + damping * direction_weight, bias


def hessian_vector_product(
    features: Tensor,
    logits: Tensor,
    direction_weight: Tensor,
    direction_bias: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    loss: str = "cross_entropy",
    damping: float = 0.0,
    targets: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""``(H + damping I) v`` for the Hessian of ``sum_i w_i l(f_i, y_i)`` in the last layer.

    .. math:: H (V, b) = \Big( \sum_i w_i\, c(z_i)\, h_i^T,\; \sum_i w_i\, c(z_i) \Big), \qquad
        c(z) = \frac{\partial^2 l}{\partial f^2} z, \qquad z_i = V h_i + b

    For cross-entropy the targets sum to one; for ``mse_probs`` and ``mse_tanh`` it is the Gauss-Newton matrix, which is
    positive semi-definite where the Hessian is not. K inner steps of SGD need it (``v_k = v_{k+1} - eta H v_{k+1}``),
    and so does the influence of Not All Unlabeled Data Are Equal, Eq. (6).

    Args:
        features: input of the last layer, ``[N, D]``.
        logits: its output, ``[N, C]``.
        direction_weight: ``V``, ``[C, D]``.
        direction_bias: ``b``, ``[C]``; None restricts the Hessian to the weight.
        weights: example weights ``[N]``; None means 1.
        loss: one of :data:`fastmeta.losses.LOSSES`.
        damping: added multiple of the identity, >= 0.
        targets: values ``[N, C]`` or int64 classes ``[N]``, where the curvature of the loss reads them
            (:mod:`fastmeta.losses`); else they are not looked at.
        impl: implementation to use; see :func:`fastmeta.use_impl`.

    Returns:
        Weight part ``[C, D]`` and bias part ``[C]``, the latter None when ``direction_bias`` is None.

    Raises:
        ValueError: a shape or the loss does not fit, the loss needs targets, or ``damping < 0``.
        TypeError: dtypes are not floating or not the same.
        RuntimeError: the named ``impl`` is not available.

    >>> import torch
    >>> weight, bias = hessian_vector_product(torch.ones(1, 2), torch.zeros(1, 2), torch.eye(2), damping=1.0)
    >>> weight.tolist(), bias
    ([[1.0, 0.0], [0.0, 1.0]], None)
    """
    targets = targets if loss in losses.READ_BY_CURVATURE else None
    tensors = features, logits, targets, direction_weight, direction_bias, weights
    arguments = (*tensors, LOSSES.get(loss), damping)
    if unnamed(impl):
        result = OPERATOR.entry(*arguments)
        if result is not NotImplemented:
            return result
    kernel = OPERATOR.select(impl, *tensors)

    def check() -> None:
        checks.loss_code(loss)
        checks.number(damping, "damping", low=0.0)
        checks.matrix(logits, "logits", "[N, C]")
        h, num_classes = _last_layer.check_outputs(features, logits)
        _last_layer.check_direction(h, num_classes, direction_weight, direction_bias)
        _last_layer.check_weights(h, weights)
        if (read := losses.curvature_targets(targets, loss)) is not None:
            checks.targets(read, h, num_classes)

    if kernel is not None:
        weight, bias = checks.run(kernel, arguments, check)
        return weight, None if direction_bias is None else bias
    check()
    y = losses.curvature_targets(targets, loss)
    y = None if y is None else losses.as_probabilities(y, logits.shape[1], logits.dtype)
    return hessian_vector_product_reference(
        features, logits, direction_weight, direction_bias, weights, loss, damping, y
    )
