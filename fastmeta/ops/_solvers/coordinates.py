"""Orthonormal bases of the feature space in which the system is solved.

The rows ``g_i`` span at most N dimensions. Outside their span ``H = 0`` and the solution is ``rhs / damping``; inside,
N coordinates are enough: with ``g_i = E^T e_i`` for an orthonormal ``E [r, K]`` the system in ``Y = X E^T`` has the
same form and the same damping, with rows ``e_i``.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastmeta.ops._solvers.joined import Joined


class Coordinates(NamedTuple):
    """``x = y E + outside / damping``."""

    features: Tensor  # e_i, [N, r]
    basis: Tensor | None  # E [r, K]; None is the identity
    complete: bool  # whether E spans the whole space

    def inside(self, rhs: Tensor) -> Tensor:
        """The right-hand side in these coordinates. ``[C, r]``."""
        return rhs if self.basis is None else rhs @ self.basis.T

    def lift(self, solution: Tensor, rhs: Tensor, rhs_inside: Tensor, damping: float) -> Tensor:
        """Back to ``[C, K]``. With ``damping = 0`` the part outside, which no solution can meet, is left at 0."""
        if self.basis is None:
            return solution
        x = solution @ self.basis
        if not self.complete and damping > 0:
            x += (rhs - rhs_inside @ self.basis) / damping
        return x


def identity(features: Tensor) -> Coordinates:
    """The given coordinates."""
    return Coordinates(features, None, True)


def span(features: Tensor, joined: Joined | None = None) -> Coordinates:
    """N coordinates in the span of the rows, by ``G^T = Q R``; exact whatever the rank of ``G``.

    Every process takes the span of the rows of all: N x K numbers to exchange, fewer than their second moment has.
    """
    q, r = torch.linalg.qr((features if joined is None else joined.all_rows(features)).T)
    rows = r.T if joined is None else joined.own_rows(r.T)
    return Coordinates(rows.contiguous(), q.T, False)


def eigenbasis(inside: Coordinates, joined: Joined | None = None) -> Coordinates:
    """The eigenbasis of the second moment ``A = sum_i e_i e_i^T``.

    Raises:
        ValueError: ``A`` overflows.
    """
    e = inside.features
    moment = e.T @ e
    if joined is not None:
        (moment,) = joined.sum(moment)
    if not bool(moment.diagonal().sum().isfinite()):
        raise ValueError(f"features must be small enough for their second moment in {e.dtype}, which overflows")
    vectors = torch.linalg.eigh(moment).eigenvectors
    basis = vectors.T if inside.basis is None else vectors.T @ inside.basis
    return Coordinates(e @ vectors, basis.contiguous(), inside.complete)
