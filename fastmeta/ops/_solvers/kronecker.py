"""Kronecker-factored preconditioner: ``H ~ B (x) A``, inverted with its damping in the eigenbases of A and B.

Martens and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", split the damping
between the factors; in the eigenbases there is nothing to split.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastmeta.ops._solvers.curvature import mean_curvature, mean_diagonal
from fastmeta.ops._solvers.joined import Joined


class OutputFactor(NamedTuple):
    """The mean curvature of the outputs, B, in one of three forms.

    ``U diag(b) U^T``; ``diag(b)`` for a loss without mixed curvature; or ``diag(b) - b b^T / sum(b)``, the curvature of
    one softmax with probabilities ``b``: zero along (1, ..., 1) as B is, with the diagonal of B. It costs no product
    with a ``[C, C]`` matrix, neither to find nor to apply.
    """

    b: Tensor  # [C]
    vectors: Tensor | None = None  # U [C, C]
    softmax: bool = False


def output_factor(
    logits: Tensor, weights: Tensor, loss: str, *, softmax: bool, joined: Joined | None = None
) -> OutputFactor:
    """Of examples with these logits ``[N, C]`` and absolute weights ``[N]``; ``softmax`` asks for the third form."""
    if loss in ("mse", "binary_cross_entropy"):
        return OutputFactor(mean_diagonal(logits, weights, loss, joined))
    if not softmax:
        values, vectors = torch.linalg.eigh(mean_curvature(logits, weights, loss, joined))
        return OutputFactor(values.clamp_min(0), vectors)
    diagonal = mean_diagonal(logits, weights, loss, joined)
    b = diagonal
    for _ in range(5):  # b - b^2 / sum(b) = diagonal
        b = diagonal / (1 - b / b.sum().clamp_min(torch.finfo(b.dtype).tiny)).clamp_min(0.1)
    return OutputFactor(b, softmax=True)


class KroneckerPreconditioner:
    """``R -> (B (x) A + damping I)^-1 R`` in coordinates where A is diagonal.

    The eigenvalues of A are read off the rows, ``a_j = sum_i e_ij^2``: exact for a basis made of these rows, and the
    best diagonal for a basis kept from earlier ones.

    Args:
        features: rows ``e_i`` in the eigenbasis of A, ``[N, r]``.
        output: the factor B.
        damping: as in the system; > 0 for the softmax form.
        joined: the processes that have the other rows; None if these are all.
    """

    def __init__(self, features: Tensor, output: OutputFactor, damping: float, joined: Joined | None = None) -> None:
        a = features.square().sum(0)
        if joined is not None:
            (a,) = joined.sum(a)
        product = output.b.unsqueeze(1) * a
        self._inverse = (product + damping).reciprocal()
        if damping == 0:
            # The range of H lies in the range of B (x) A; outside it the pseudo-inverse is 0.
            floor = torch.finfo(product.dtype).eps * max(product.shape) * product.amax()
            self._inverse.masked_fill_(product <= floor, 0.0)
        self._vectors = output.vectors
        self._b = output.b
        self._rank_one: Tensor | None = None
        if output.softmax:
            # Sherman-Morrison for each feature; sum_k b_k (1 - a b_k / (a b_k + damping)) without the cancellation.
            share = output.b.unsqueeze(1) * self._inverse
            share /= share.sum(0).clamp_min(torch.finfo(share.dtype).tiny)
            self._rank_one = share.mul_(a / damping)

    def __call__(self, residual: Tensor) -> Tensor:
        """``[C, r]``."""
        if self._vectors is not None:
            return self._vectors @ (self._vectors.T @ residual).mul_(self._inverse)
        z = residual * self._inverse
        if self._rank_one is not None:
            z.addcmul_(self._rank_one, (self._b @ z).expand_as(z))
        return z
