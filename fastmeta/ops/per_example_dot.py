"""Per-example gradient of the last layer, dotted with a direction, with no per-example gradient in memory."""

from torch import Tensor

from fastmeta import checks, losses
from fastmeta.capture import Head
from fastmeta.dispatch import Operator, in_own_dtype, unnamed
from fastmeta.losses import LOSSES
from fastmeta.ops import _last_layer

OPERATOR = Operator(
    "per_example_dot",
    numbers=1,
    triton="per_example_dot",
    fake=lambda features, *rest: features.new_empty(features.shape[0]),
)


@in_own_dtype
def per_example_dot_reference(
    features: Tensor,  # [N, D]
    logits: Tensor,  # [N, C]
    targets: Tensor,  # [N, C]
    direction_weight: Tensor,  # [C, D]
    direction_bias: Tensor | None,  # [C]
    loss: str,
) -> Tensor:  # [N]
    """``<grad l_i, (V, b)> = <r_i, z_i>`` with ``z = h V^T + b``."""
    z = _last_layer.logit_tangent(features, direction_weight, direction_bias)
    return (losses.residual(logits, targets, loss) * z).sum(-1)


def per_example_dot(
    features: Tensor,
    logits: Tensor | Head,
    targets: Tensor,
    direction_weight: Tensor,
    direction_bias: Tensor | None = None,
    *,
    loss: str = "cross_entropy",
    impl: str | None = None,
) -> Tensor:
    r"""Derivative of each example's loss along a direction of the last layer, ``<grad l_i, (V, b)>``.

    .. math:: \langle \nabla l_i, (V, b) \rangle = \langle r_i, V h_i + b \rangle

    With ``(V, b) = -H^{-1} grad L_val`` this is the influence of an example's weight on the validation loss
    (Not All Unlabeled Data Are Equal, Eq. 6).

    Args:
        features: input of the last layer, ``[N, D]``.
        logits: its output ``[N, C]``, or a :class:`fastmeta.Head` from which it is computed inside.
        targets: probabilities ``[N, C]`` or int64 classes ``[N]``; class k is the row with a 1 at k, for every loss.
        direction_weight: ``V``, ``[C, D]``.
        direction_bias: ``b``, ``[C]``; None means the bias does not move.
        loss: one of :data:`fastmeta.losses.LOSSES`.
        impl: implementation to use; see :func:`fastmeta.use_impl`.

    Returns:
        One number for each example, ``[N]``.

    Raises:
        ValueError: a shape or the loss does not fit, or a class is out of range.
        TypeError: dtypes are not floating or not the same.
        RuntimeError: the named ``impl`` is not available.

    >>> import torch
    >>> features, logits = torch.ones(1, 3), torch.zeros(1, 2)
    >>> per_example_dot(features, logits, torch.tensor([0]), torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]))
    tensor([-3.])
    """
    f, head_weight, head_bias = _last_layer.split(logits)
    tensors = features, f, head_weight, head_bias, targets, direction_weight, direction_bias
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
        _last_layer.check_direction(h, num_classes, direction_weight, direction_bias)

    if kernel is not None:
        return checks.run(kernel, arguments, check)
    check()
    f = logits.logits(features) if isinstance(logits, Head) else logits
    y = losses.as_probabilities(targets, f.shape[1], f.dtype)
    return per_example_dot_reference(features, f, y, direction_weight, direction_bias, loss)
