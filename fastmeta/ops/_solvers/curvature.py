"""The curvature of the outputs, written out: ``C_i = diag(d_i) - s_i p_i^T - p_i s_i^T``."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastmeta import losses
from fastmeta.ops._solvers.joined import Joined


class OutputCurvature(NamedTuple):
    """``C_i = d2l_i/df2`` of every example; ``s`` and ``p`` are None where it is diagonal."""

    diagonal: Tensor  # d [N, C]
    s: Tensor | None  # [N, C]
    p: Tensor | None  # [N, C]


def output_curvature(logits: Tensor, loss: str) -> OutputCurvature:
    """The loss's curvature in the form above; Gauss-Newton for ``mse_probs``.

    ``mse_probs``: with ``J = diag(p) - p p^T``, ``2 J J = 2 diag(p^2) - s p^T - p s^T``, ``s = 2 p^2 - |p|^2 p``.
    """
    if loss == "mse":
        return OutputCurvature(torch.full_like(logits, 2.0), None, None)
    p = losses.prediction(logits, loss)
    if loss == "binary_cross_entropy":
        return OutputCurvature(p * (1 - p), None, None)
    if loss == "cross_entropy":
        return OutputCurvature(p, p / 2, p)
    square = p.square()
    return OutputCurvature(2 * square, 2 * square - square.sum(1, keepdim=True) * p, p)


def mean_curvature(logits: Tensor, weights: Tensor, loss: str, joined: Joined | None = None) -> Tensor:
    """``B = sum_i w_i C_i / sum_i w_i`` for weights >= 0 ``[N]``. ``[C, C]``."""
    weights = weights / _total(weights, joined)
    d, s, p = output_curvature(logits, loss)
    mean = torch.diag(weights @ d)
    if s is not None and p is not None:
        mixed = (weights.unsqueeze(1) * s).T @ p
        mean = mean - mixed - mixed.T
    return mean if joined is None else joined.sum(mean)[0]


def mean_diagonal(logits: Tensor, weights: Tensor, loss: str, joined: Joined | None = None) -> Tensor:
    """The diagonal of B, in one pass over the logits. ``[C]``."""
    d, s, p = output_curvature(logits, loss)
    mean = weights / _total(weights, joined) @ (d if s is None or p is None else d - 2 * s * p)
    return mean if joined is None else joined.sum(mean)[0]


def _total(weights: Tensor, joined: Joined | None) -> Tensor:
    total = weights.sum() if joined is None else joined.sum(weights.sum())[0]
    return total.clamp_min(torch.finfo(weights.dtype).tiny)
