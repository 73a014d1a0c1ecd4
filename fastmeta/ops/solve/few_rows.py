"""Conjugate gradients in the logit tangents of the rows, for few rows and many outputs."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastmeta import losses
from fastmeta.dispatch import in_own_dtype
from fastmeta.ops.solve import conjugate_gradient as cg
from fastmeta.ops.solve.kronecker import SolverState
from fastmeta.ops.solve.system import fold


class RowSpace:
    r"""The damped system in the logit tangents of its N rows, for ``damping > 0``: N C unknowns in place of C K.

    Started at ``X = B / damping``, or at 0 for a ``B`` in the span of the rows, every residual of conjugate gradients
    is ``rho^T G`` with a ``rho [N, C]``, and every direction is ``pi^T G``: G are the rows. With the Gram matrix
    ``Gamma = G G^T`` and the logit tangent ``t = Gamma pi`` of a direction,

    .. math:: (H + damping I)\, \pi^T G = (damping\, \pi + w\, c(t))^T G, \qquad
        \lVert \rho^T G \rVert^2 = \langle \rho, \Gamma \rho \rangle

    so an iteration is one product with ``[N, N]``, and its residual is that of X. To
    :func:`fastmeta.ops.solve.conjugate_gradient.conjugate_gradient` it is a preconditioned system: Gamma is the
    preconditioner, ``z = [Gamma rho, rho]``, ``p = [t, pi]``, and of the solution ``[s, Y]`` the part ``Y`` gives
    ``X = X_0 + Y^T G``, with ``s = Gamma Y``.

    Args:
        features: rows G, ``[N, K]``.
        logits: ``[N, C]``.
        weights: factors of the rows' curvature ``[N]``, of any sign; None means 1.
        loss: name of the loss.
        damping: added multiple of the identity, > 0.
        targets: ``[N, C]``, where the loss's curvature reads them.
    """

    def __init__(
        self,
        features: Tensor,
        logits: Tensor,
        weights: Tensor | None,
        loss: str,
        damping: float,
        targets: Tensor | None = None,
    ) -> None:
        self.gram = features @ features.T
        self.damping = damping
        self.curved = losses.of(loss).fixed_curvature(logits, targets, weights)
        """``w c(z)`` of a logit tangent ``[N, C]``"""
        self._images = logits.new_empty(2, *logits.shape)

    def __call__(self, direction: Tensor) -> Tensor:
        """``damping pi + w c(t)`` of ``[t, pi]``. ``[N, C]``."""
        tangent, coefficients = direction.unbind()
        return self.curved(tangent).add_(coefficients, alpha=self.damping)

    def precondition(self, residual: Tensor) -> Tensor:
        """``[Gamma rho, rho]``, overwritten by the next call. ``[2, N, C]``."""
        torch.mm(self.gram, residual, out=self._images[0])
        self._images[1].copy_(residual)
        return self._images

    def solve(self, residual: Tensor, target: Tensor | float, budget: int, impl: str | None) -> cg.Outcome:
        """``[s, Y]`` ``[2, N, C]`` that takes the norm of a residual ``rho`` down to ``target``."""
        return cg.conjugate_gradient(
            self,
            residual,
            target=target,
            max_iter=budget,
            updates=cg.updates_for(residual, impl),
            precondition=self.precondition,
            energy=True,
            look=cg.look_every(residual),
        )

    def norm(self, residual: Tensor) -> Tensor:
        """``||rho^T G||``, which rounding may make 0 where it is not. float64 scalar."""
        image = self.gram @ residual
        return torch.dot(residual.reshape(-1).double(), image.reshape(-1).double()).clamp_min(0).sqrt()


def pays(n: int, c: int, k: int) -> bool:
    """Whether conjugate gradients in the space of N rows take half the flops or less, for a system worth the change.

    An iteration takes ``2 n^2 c`` flops in place of ``4 n c k``, and the Gram matrix ``2 n^2 k``, spread over 20
    iterations.

    >>> [pays(*size) for size in ((384, 1000, 2049), (512, 10, 129), (96, 100, 513), (1024, 1000, 2049))]
    [True, False, True, True]
    """
    return n * c * k >= 2**20 and n * (k + 20 * c) <= 20 * c * k


class RowAnswer(NamedTuple):
    """``X = Y^T G``, a solution in the span of the rows, that nobody has multiplied out."""

    coefficients: Tensor  # Y [N, C]
    tangent: Tensor  # G X^T = Gamma Y [N, C], the logit tangent of every row
    iterations: int | Tensor
    residual: float | Tensor
    indefinite: bool = False
    """negative curvature stopped it; not known of a captured solve, whose residual stays large"""


@in_own_dtype
def solve_rows(
    features: Tensor,  # [N, D]
    logits: Tensor,  # [N, C]
    rhs: Tensor,  # [N, C]
    weights: Tensor,  # [N]
    *,
    bias: bool,
    loss: str,
    damping: float,
    tol: float,
    max_iter: int,
    state: SolverState,
    targets: Tensor | None = None,  # [N, C]
) -> RowAnswer:
    """``(H + damping I) X = B`` for a ``B = E^T G`` in the span of the rows ``G = [h, 1]``, with X left there.

    Nothing of the size of X is formed, and the true residual costs two products with the Gram matrix.

    Args:
        features: rows h; one of weight 0 takes part in the span alone.
        logits: their logits.
        rhs: ``E``.
        weights: example weights.
        bias: whether the bias moves too; else ``G = h``.
        loss: name of the loss.
        damping: > 0.
        tol: relative residual to reach.
        max_iter: most iterations.
        state: knows how many iterations a CUDA graph should hold.
        targets: of the rows, where the loss's curvature reads them.
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    rows = fold(features, features.new_ones(len(features)), padded=True) if bias else features
    y = None if targets is None else targets.to(dtype)
    space = RowSpace(rows.to(dtype), logits.to(dtype), weights.to(dtype), loss, damping, y)
    rhs = residual = rhs.to(dtype)
    look, scale = cg.look_every(rhs), space.norm(rhs)
    budget = max_iter if look else state.most_in_graph(max_iter)
    solution, made, size = torch.zeros_like(rhs), 0, 1.0
    while True:
        outcome = space.solve(residual, cg.MARGIN * tol * scale, budget - made, None)
        solution = solution + outcome.solution[1]
        tangent = space.gram @ solution
        residual = rhs - space.curved(tangent) - damping * solution
        left = torch.where(scale == 0, 0, space.norm(residual) / scale)
        status = outcome.row[cg.STATUS]
        if isinstance(outcome.row, Tensor):
            return RowAnswer(solution, tangent, outcome.row[cg.COUNT].to(torch.int64), left)
        made += int(outcome.row[cg.COUNT])
        previous, size = size, left.item()
        if size <= tol or made >= budget or status == cg.NEGATIVE or not size <= cg.STAGNATION * previous:
            break
    state.iterations = made
    # Without negative weights it is a rounding error.
    negative = status == cg.NEGATIVE and bool((weights < 0).any())
    return RowAnswer(solution, tangent, made, size, bool(negative))
