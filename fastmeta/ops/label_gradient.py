"""Label gradient of the last layer: how the predictions on unlabeled examples move along a direction."""

from torch import Tensor

from fastmeta import checks, losses
from fastmeta.capture import Head
from fastmeta.dispatch import Operator, in_own_dtype, unnamed
from fastmeta.losses import LOSSES
from fastmeta.ops import _last_layer

OPERATOR = Operator(
    "label_gradient",
    numbers=2,
    triton="label_gradient",
    fake=lambda features, logits, head_weight, *rest: features.new_empty(
        features.shape[0], _last_layer.num_classes(logits, head_weight)
    ),
)


@in_own_dtype
def label_gradient_reference(
    features: Tensor,  # [N, D]
    logits: Tensor,  # [N, C]
    direction_weight: Tensor,  # [C, D]
    direction_bias: Tensor | None,  # [C]
    loss: str,
    scale: float,
    targets: Tensor | None = None,  # [N, C]
) -> Tensor:  # [N, C]
    """``scale t(z_i)`` with ``z = h V^T + b``."""
    z = _last_layer.logit_tangent(features, direction_weight, direction_bias)
    return scale * losses.label_tangent(logits, z, loss, targets)


def label_gradient(
    features: Tensor,
    logits: Tensor | Head,
    direction_weight: Tensor,
    direction_bias: Tensor | None = None,
    *,
    loss: str = "cross_entropy",
    scale: float = 1.0,
    targets: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    r"""Gradient of an outer loss G with respect to the labels of an inner step on the last layer.

    For ``theta' = theta - eta grad (1/B) sum_i w_i l(f_i, y_i)`` and ``(V, b) = grad G(theta')``,

    .. math:: \frac{\partial G}{\partial y_i} = \frac{\eta w_i}{B} t(z_i), \qquad z_i = V h_i + b

    with ``t(z) = z - <p, z>`` for cross-entropy and ``2 J z`` for the squared error of probabilities: Learning to
    Impute, update rule V1, where only the last layer moves. ``scale`` stands for ``eta / B``.

    Args:
        features: input of the last layer, ``[N, D]``.
        logits: its output ``[N, C]``, or a :class:`fastmeta.Head` from which it is computed inside.
        direction_weight: ``V``, ``[C, D]``.
        direction_bias: ``b``, ``[C]``; None means the bias does not move.
        loss: one of :data:`fastmeta.losses.LOSSES`.
        scale: factor of the result.
        targets: values ``[N, C]`` or int64 classes ``[N]``, where the label tangent of the loss reads them
            (:mod:`fastmeta.losses`); else they are not looked at.
        impl: implementation to use; see :func:`fastmeta.use_impl`.

    Returns:
        ``[N, C]``.

    Raises:
        ValueError: a shape or the loss does not fit, or the loss needs targets.
        TypeError: dtypes are not floating or not the same.
        RuntimeError: the named ``impl`` is not available.

    >>> import torch
    >>> label_gradient(torch.ones(1, 2), torch.zeros(1, 2), torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    tensor([[ 1., -1.]])
    """
    f, head_weight, head_bias = _last_layer.split(logits)
    targets = targets if loss in losses.READ_BY_LABEL_TANGENT else None
    tensors = features, f, head_weight, head_bias, targets, direction_weight, direction_bias
    arguments = (*tensors, LOSSES.get(loss), scale)
    if unnamed(impl):
        result = OPERATOR.entry(*arguments)
        if result is not NotImplemented:
            return result
    kernel = OPERATOR.select(impl, *tensors)

    def check() -> None:
        checks.loss_code(loss)
        checks.number(scale, "scale")
        h, num_classes = _last_layer.check_outputs(features, logits)
        _last_layer.check_direction(h, num_classes, direction_weight, direction_bias)
        if (read := losses.label_tangent_targets(targets, loss)) is not None:
            checks.targets(read, h, num_classes)

    if kernel is not None:
        return checks.run(kernel, arguments, check)
    check()
    f = logits.logits(features) if isinstance(logits, Head) else logits
    y = losses.label_tangent_targets(targets, loss)
    y = None if y is None else losses.as_probabilities(y, f.shape[1], f.dtype)
    return label_gradient_reference(features, f, direction_weight, direction_bias, loss, scale, y)
