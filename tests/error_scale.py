"""How far rounding can take a result: each operator's formula with every term made positive, in float64.

An error divided by this scale is in units of rounding, for small entries beside large ones as well; a maximum over it
cannot hide a wrong small entry behind the error of a large one.
"""

import torch
from torch import Tensor

from fastmeta import Head
from fastmeta.losses import as_probabilities

UNDERFLOW = torch.finfo(torch.float32).tiny / torch.finfo(torch.float32).eps


def product(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """``|x| |W|^T + |b|``."""
    size = left.abs() @ right.abs().T
    return size if bias is None else size + bias.abs()


def logits_and_size(features: Tensor, logits: Tensor | Head) -> tuple[Tensor, Tensor | float]:
    """The logits, and the size of the sums they are made of, if the operator makes them."""
    if isinstance(logits, Head):
        return logits.logits(features), product(features, logits.weight, logits.bias)
    return logits, 0.0


def predictions(logits: Tensor, size: Tensor | float, loss: str) -> Tensor:
    """``p`` times its own relative sensitivity: ``1 + df + <p, df>``; below the normal numbers p may become 0."""
    if loss == "binary_cross_entropy":
        return logits.sigmoid() * (1 + logits.abs() + size) + UNDERFLOW
    p = logits.softmax(-1)
    if logits.shape[1] == 0:
        return p
    spread = (logits - logits.max(-1, keepdim=True)[0]).abs() + size
    spread = torch.where(torch.isfinite(spread), spread, 0)
    return p * (1 + spread + (p * spread).sum(-1, keepdim=True)) + UNDERFLOW


def jacobian(p: Tensor, vector: Tensor) -> Tensor:
    return p * (vector + (p * vector).sum(-1, keepdim=True))


def tanh_slope(logits: Tensor, size: Tensor | float) -> Tensor:
    """``1 - tanh(f)^2`` with both terms positive, and what the rounding of f moves it by."""
    return 1 + logits.tanh().square() + size


def huber_slope(logits: Tensor, targets: Tensor, size: Tensor | float, unit: float) -> Tensor:
    """1 or 0; without a bound where rounding decides on which side of the kink an entry is.

    Logits that an operator makes of 16-bit features may be rounded to 16 bits on the way, as torch's own are: ``unit``.
    """
    gap = (logits - targets).abs()
    rounding = 1e-5 * (logits.abs() + targets.abs() + size) + unit * logits.abs()
    return torch.where((gap - 1).abs() <= rounding, 1e30, (gap <= 1).double())


def residual(features: Tensor, logits: Tensor | Head, targets: Tensor, loss: str) -> Tensor:
    f, size = logits_and_size(features, logits)
    y = as_probabilities(targets, f.shape[1], f.dtype).abs()
    if loss == "mse":
        return 2 * (f.abs() + size + y)
    if loss == "huber":
        return f.abs() + size + y
    if loss == "mse_tanh":
        return 2 * (f.tanh().abs() + size + y.tanh()) * tanh_slope(f, size)
    p = predictions(f, size, loss)
    if loss == "cross_entropy":
        return y.sum(-1, keepdim=True) * p + y
    return p + y if loss == "binary_cross_entropy" else 2 * jacobian(p, p + y)


def last_layer_gradient(features, logits, targets, weights=None, *, loss):
    r = residual(features, logits, targets, loss)
    r = r if weights is None else weights.abs().unsqueeze(-1) * r
    return r.T @ features.abs(), r.sum(0)


def per_example_dot(features, logits, targets, direction_weight, direction_bias=None, *, loss):
    z = product(features, direction_weight, direction_bias)
    return ((residual(features, logits, targets, loss) * z).sum(-1),)


def label_gradient(features, logits, direction_weight, direction_bias=None, *, loss, scale=1.0, targets=None, unit=0.0):
    z = product(features, direction_weight, direction_bias)
    if loss == "binary_cross_entropy":
        return (abs(scale) * z,)
    if loss == "mse":
        return (abs(scale) * 2 * z,)
    f, size = logits_and_size(features, logits)
    if loss == "huber":
        return (abs(scale) * huber_slope(f, as_probabilities(targets, f.shape[1], f.dtype), size, unit) * z,)
    if loss == "mse_tanh":
        y = as_probabilities(targets, f.shape[1], f.dtype)
        return (abs(scale) * 2 * tanh_slope(y, 0.0) * tanh_slope(f, size) * z,)
    p = predictions(f, size, loss)
    if loss == "cross_entropy":
        return (abs(scale) * (z + (p * z).sum(-1, keepdim=True)),)
    return (abs(scale) * 2 * jacobian(p, z),)


def hessian_vector_product(
    features, logits, direction_weight, direction_bias=None, weights=None, *, loss, damping=0.0, targets=None, unit=0.0
):
    z = product(features, direction_weight, direction_bias)
    f, size = logits_and_size(features, logits)
    p = predictions(f, size, loss)
    if loss == "mse":
        c = 2 * z
    elif loss == "huber":
        c = huber_slope(f, as_probabilities(targets, f.shape[1], f.dtype), size, unit) * z
    elif loss == "mse_tanh":
        c = 2 * tanh_slope(f, size).square() * z
    elif loss == "binary_cross_entropy":
        c = p * z
    else:
        c = jacobian(p, z) if loss == "cross_entropy" else 2 * jacobian(p, jacobian(p, z))
    c = c if weights is None else weights.abs().unsqueeze(-1) * c
    weight = c.T @ features.abs() + damping * direction_weight.abs()
    return (weight,) if direction_bias is None else (weight, c.sum(0) + damping * direction_bias.abs())


def feature_similarity(features_u, features_h, residual_h, *, scale=1.0, bias=True):
    size = features_u.abs() @ (features_h.abs().T @ residual_h.abs())
    return (abs(scale) * (size + residual_h.abs().sum(0) if bias else size),)


def finite_difference_labels(logits_plus, logits_minus, labels, epsilon, *, step, project=True):
    p = [predictions(f, 0.0, "cross_entropy") for f in (logits_plus, logits_minus)]
    moved = labels.abs() + abs(step) * (p[0] + p[1]) / epsilon.double().reshape(())
    if not project:
        return (moved,)
    # Divided by a sum of at least the labels' own, which every test keeps near 1: the clip can only raise it.
    return (moved + labels.abs() * moved.sum(-1, keepdim=True) + moved * moved.sum(-1, keepdim=True),)
