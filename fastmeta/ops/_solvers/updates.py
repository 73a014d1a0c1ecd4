"""The vector updates of conjugate gradients in PyTorch, with every scalar on the device.

The same functions as in ``triton_kernels/conjugate_gradient.py``, which takes their place where Triton runs.
"""

from typing import Protocol

import torch
from torch import Tensor

from fastmeta import _conjugate_gradient_scalars as scalars
from fastmeta import _extension, dispatch


class Updates(Protocol):
    """A module with these functions."""

    def num_partials(self, vector: Tensor) -> int:
        """Number of partial sums over a vector like this."""

    def dot(self, a: Tensor, b: Tensor, partials: Tensor, now: Tensor) -> None:
        """``<a, b>`` as partial sums, float64."""

    def advance(self, x: Tensor, r: Tensor, p: Tensor, q: Tensor, bends: Tensor, squares: Tensor, now: Tensor) -> None:
        """``x += a p``, ``r -= a q`` in place for ``a = slope / bend``; ``<r, r>`` as partial sums."""

    def turn(
        self,
        p: Tensor,
        z: Tensor,
        bends: Tensor,
        squares: Tensor,
        slopes: Tensor,
        now: Tensor,
        following: Tensor,
    ) -> None:
        """``p = z + b p`` in place for ``b = <r, z> / slope``, and the row of scalars after the row ``now``."""


class TorchUpdates:
    """Sums in one part."""

    def num_partials(self, vector: Tensor) -> int:
        """One."""
        return 1

    def dot(self, a: Tensor, b: Tensor, partials: Tensor, now: Tensor) -> None:
        """``<a, b>``."""
        partials.copy_(torch.dot(a.reshape(-1), b.reshape(-1)))

    def advance(self, x: Tensor, r: Tensor, p: Tensor, q: Tensor, bends: Tensor, squares: Tensor, now: Tensor) -> None:
        """Nothing happens unless the solve is running and the curvature positive."""
        bend, row = bends.sum(), now.unbind()
        moves = (row[scalars.STATUS] == scalars.RUNNING) & (bend <= 0).logical_not()
        length = torch.where(moves, row[scalars.SLOPE] / bend, 0).to(x.dtype)
        x.addcmul_(p, length)
        r.addcmul_(q, length, value=-1)
        self.dot(r, r, squares, now)

    def turn(
        self,
        p: Tensor,
        z: Tensor,
        bends: Tensor,
        squares: Tensor,
        slopes: Tensor,
        now: Tensor,
        following: Tensor,
    ) -> None:
        """``p`` is of no more use once the solve has stopped."""
        bend, squared, slope = bends.sum(), squares.sum(), slopes.sum()
        row = now.unbind()
        running = row[scalars.STATUS] == scalars.RUNNING
        moved = running & (bend <= 0).logical_not()
        status = torch.where(slope > 0, scalars.RUNNING, scalars.FLAT)
        status = torch.where(squared <= row[scalars.TARGET], scalars.CONVERGED, status)
        status = torch.where(squared < torch.inf, status, scalars.NOT_FINITE)
        status = torch.where(bend == 0, scalars.FLAT, status)
        status = torch.where(bend < 0, scalars.NEGATIVE, status)
        ratio = torch.where(running, slope / row[scalars.SLOPE], 0).to(p.dtype)
        after = following.unbind()
        after[scalars.SLOPE].copy_(slope)
        after[scalars.SQUARED].copy_(torch.where(moved, squared, row[scalars.SQUARED]))
        after[scalars.TARGET].copy_(row[scalars.TARGET])
        after[scalars.COUNT].copy_(row[scalars.COUNT] + running)
        after[scalars.STATUS].copy_(torch.where(running, status, row[scalars.STATUS]))
        p.mul_(ratio).add_(z)


def updates_for(vector: Tensor, impl: str | None) -> Updates:
    """Triton's updates where its kernels run on this tensor, unless ``impl`` names the reference."""
    named = impl if impl is not None else dispatch._override.name
    fits = vector.is_cpu if _extension.INTERPRETED else vector.is_cuda
    if _extension.TRITON_REASON is not None or not fits or named == "reference" or type(vector) is not Tensor:
        return TorchUpdates()
    from fastmeta.triton_kernels import conjugate_gradient

    return conjugate_gradient
