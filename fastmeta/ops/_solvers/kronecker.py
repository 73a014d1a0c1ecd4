"""Kronecker-factored preconditioner: ``H ~ B (x) A``, inverted with its damping in the eigenbases of A and B."""

import torch
from torch import Tensor

from fastmeta.ops._solvers.curvature import mean_curvature


class OutputFactor:
    """Eigenvalues and eigenvectors of the mean output curvature ``B`` (James Martens and Roger Grosse, KFAC).

    Args:
        values: ``b [C]``.
        vectors: ``U [C, C]``; None if B is diagonal.
    """

    def __init__(self, values: Tensor, vectors: Tensor | None) -> None:
        self.values = values
        self.vectors = vectors

    @classmethod
    def of(cls, logits: Tensor, weights: Tensor, loss: str) -> "OutputFactor":
        """Of the examples with these logits ``[N, C]`` and absolute weights ``[N]``."""
        mean = mean_curvature(logits, weights, loss)
        if mean.dim() == 1:
            return cls(mean, None)
        values, vectors = torch.linalg.eigh(mean)
        return cls(values.clamp_min(0), vectors)


class KroneckerPreconditioner:
    """``R -> U ((U^T R) / (b_k a_j + damping))`` in coordinates where A is diagonal.

    The eigenvalues ``a`` are read off the rows, ``a_j = sum_i e_ij^2``: exact for a basis made of these rows, and the
    best diagonal for a basis kept from earlier ones.

    Args:
        features: rows ``e_i`` in the eigenbasis of A, ``[N, r]``.
        output: the factor B.
        damping: as in the system.
    """

    def __init__(self, features: Tensor, output: OutputFactor, damping: float) -> None:
        moment = features.square().sum(0)
        product = output.values.unsqueeze(1) * moment
        denominator = product + damping
        if damping > 0:
            self._inverse = denominator.reciprocal()
        else:
            # The range of H lies in the range of B (x) A; outside it the pseudo-inverse is 0.
            floor = torch.finfo(product.dtype).eps * max(product.shape) * product.amax()
            self._inverse = torch.where(product > floor, denominator.reciprocal(), torch.zeros_like(product))
        self._vectors = output.vectors
        self._rotated = torch.empty_like(self._inverse)

    def __call__(self, residual: Tensor) -> Tensor:
        """``[C, r]``."""
        if self._vectors is None:
            return residual * self._inverse
        torch.mm(self._vectors.T, residual, out=self._rotated)
        return self._vectors @ self._rotated.mul_(self._inverse)
