"""The losses: their definition, and the three row functions every operator is made of.

Each function maps ``[N, C]`` rows to ``[N, C]`` rows in plain, differentiable PyTorch; ``csrc/losses.h`` holds the same
functions for the kernels. ``f`` are logits, ``y`` targets, ``z`` a logit tangent, ``p`` the prediction.

=====================  ==========================  ====================  =================================
loss                   residual ``dl/df``          label tangent         curvature ``(d2l/df2) z``
=====================  ==========================  ====================  =================================
cross_entropy          ``s p - y``, ``s = sum y``  ``z - <p, z>``        ``p (z - <p, z>)``
binary_cross_entropy   ``sigmoid(f) - y``          ``z``                 ``p (1 - p) z``
mse                    ``2 (f - y)``               ``2 z``               ``2 z``
mse_probs              ``2 J (p - y)``             ``2 J z``             ``2 J (J z)`` (Gauss-Newton)
=====================  ==========================  ====================  =================================

``J u = p (u - <p, u>)`` is the softmax Jacobian. The operators take these four. The methods also take ``mse_tanh``,
``sum_c (tanh f - tanh y)^2``, the inner loss of the landmarks in Learning to Impute: here alone, in PyTorch.
"""

import torch
from torch import Tensor
from torch.nn import functional

# The order is the kernels' enum (csrc/losses.h).
LOSSES: dict[str, int] = {"cross_entropy": 0, "binary_cross_entropy": 1, "mse": 2, "mse_probs": 3}
INNER_LOSSES = (*LOSSES, "mse_tanh")


def prediction(logits: Tensor, loss: str) -> Tensor:
    """What the loss compares with its target: ``softmax(f)``, ``sigmoid(f)`` or ``f`` itself. ``[N, C]``."""
    if loss in ("mse", "mse_tanh"):
        return logits
    return logits.sigmoid() if loss == "binary_cross_entropy" else logits.softmax(dim=-1)


def loss_per_example(logits: Tensor, targets: Tensor, loss: str) -> Tensor:
    """The definition, ``l(f_i, y_i)`` summed over the C outputs of a row. ``[N]``."""
    if loss == "cross_entropy":
        return -(targets * logits.log_softmax(dim=-1)).sum(-1)
    if loss == "binary_cross_entropy":
        return functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(-1)
    if loss == "mse_tanh":
        return (logits.tanh() - targets.tanh()).square().sum(-1)
    return (prediction(logits, loss) - targets).square().sum(-1)


def softmax_jacobian(probabilities: Tensor, vector: Tensor) -> Tensor:
    """``J u = p (u - <p, u>)`` for each row. ``[N, C]``."""
    return probabilities * (vector - (probabilities * vector).sum(-1, keepdim=True))


def residual(logits: Tensor, targets: Tensor, loss: str) -> Tensor:
    """``r = dl/df``. ``[N, C]``."""
    p = prediction(logits, loss)
    if loss == "cross_entropy":
        return targets.sum(-1, keepdim=True) * p - targets
    if loss == "binary_cross_entropy":
        return p - targets
    if loss == "mse":
        return 2 * (p - targets)
    if loss == "mse_tanh":
        t = logits.tanh()
        return 2 * (t - targets.tanh()) * (1 - t * t)
    return 2 * softmax_jacobian(p, p - targets)


def residual_tangent(logits: Tensor, targets: Tensor, logit_tangent: Tensor, loss: str) -> Tensor:
    """``(d2l/df2) z``, exact for every loss and any targets: what :func:`curvature` approximates. ``[N, C]``."""
    if loss == "cross_entropy":
        return targets.sum(-1, keepdim=True) * softmax_jacobian(prediction(logits, loss), logit_tangent)
    if loss == "mse_tanh":
        t = logits.tanh()
        slope = 1 - t * t
        return (2 * slope * slope - 4 * (t - targets.tanh()) * t * slope) * logit_tangent
    if loss != "mse_probs":
        return curvature(logits, logit_tangent, loss)
    p = prediction(logits, loss)
    gap, moved = p - targets, softmax_jacobian(p, logit_tangent)
    mean = (p * gap).sum(-1, keepdim=True)
    return 2 * (softmax_jacobian(p, moved) + moved * (gap - mean) - p * (moved * gap).sum(-1, keepdim=True))


def label_pull(logits: Tensor, loss: str, targets: Tensor | None = None) -> Tensor:
    """``-dl/dy`` as a function of the logits, up to a constant: its derivative is :func:`label_tangent`. ``[N, C]``.

    ``log p``, ``f``, ``2 f`` and ``2 p`` for the four losses; ``mse_tanh`` needs the targets.
    """
    if loss == "cross_entropy":
        return logits.log_softmax(dim=-1)
    if loss == "mse_tanh":
        return 2 * _tanh_slope(targets) * logits.tanh()
    if loss == "binary_cross_entropy":
        return logits
    return 2 * prediction(logits, loss)


def label_tangent(logits: Tensor, logit_tangent: Tensor, loss: str, targets: Tensor | None = None) -> Tensor:
    """``t(z) = D_z(-dl/dy)``: how the loss's own pull on its label moves along the direction. ``[N, C]``.

    Only ``mse_tanh`` depends on the targets.
    """
    if loss == "binary_cross_entropy":
        return logit_tangent
    if loss == "mse_tanh":
        return 2 * _tanh_slope(targets) * (1 - logits.tanh().square()) * logit_tangent
    if loss == "mse":
        return 2 * logit_tangent
    p = prediction(logits, loss)
    if loss == "cross_entropy":
        return logit_tangent - (p * logit_tangent).sum(-1, keepdim=True)
    return 2 * softmax_jacobian(p, logit_tangent)


def _tanh_slope(targets: Tensor | None) -> Tensor:
    if targets is None:
        raise ValueError("targets are needed by mse_tanh, got None")
    return 1 - targets.tanh().square()


def curvature(logits: Tensor, logit_tangent: Tensor, loss: str) -> Tensor:
    """``c(z) = (d2l/df2) z``, for targets that sum to one; Gauss-Newton for ``mse_probs``. ``[N, C]``."""
    if loss == "mse":
        return 2 * logit_tangent
    p = prediction(logits, loss)
    if loss == "binary_cross_entropy":
        return p * (1 - p) * logit_tangent
    if loss == "cross_entropy":
        return softmax_jacobian(p, logit_tangent)
    return 2 * softmax_jacobian(p, softmax_jacobian(p, logit_tangent))


def gauss_newton(logits: Tensor, targets: Tensor, logit_tangent: Tensor, loss: str) -> Tensor:
    """``c(z)`` of any targets: :func:`residual_tangent` without the curvature of the prediction. ``[N, C]``.

    Positive semi-definite for every loss, and the second derivative itself for the first three.
    """
    if loss == "cross_entropy":
        return residual_tangent(logits, targets, logit_tangent, loss)
    if loss == "mse_tanh":
        return 2 * (1 - logits.tanh().square()).square() * logit_tangent
    return curvature(logits, logit_tangent, loss)


def as_probabilities(targets: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """Targets as ``[N, C]``: class indices ``[N]`` become one-hot rows, probabilities pass through."""
    if targets.dim() == 1:
        return functional.one_hot(targets, num_classes).to(dtype)
    return targets
