"""Conjugate gradients, plain or preconditioned."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastmeta.ops._solvers.system import DampedHessian


def conjugate_gradient(
    matmul: Callable[[Tensor], Tensor | None],
    rhs: Tensor,  # [C, r]
    *,
    target: float,
    max_iter: int,
    precondition: Callable[[Tensor], Tensor] | None = None,
    give_up: Callable[[list[float]], bool] | None = None,
    indefinite: bool = False,
) -> tuple[Tensor, Tensor, int, bool]:  # x, rhs - matmul(x) as the recurrence has it, iterations, given up
    """Solve ``matmul(x) = rhs`` from ``x = 0`` until the norm of the residual is at most ``target``.

    Args:
        matmul: the symmetric operator; None ends the solve.
        rhs: right-hand side; not changed.
        target: norm of the residual to reach.
        max_iter: most products with ``matmul``.
        precondition: approximate inverse; None is the identity.
        give_up: asked after each iteration with the residual norms so far; True ends the solve.
        indefinite: whether the operator may have negative eigenvalues; then negative curvature raises. Otherwise it
            is a rounding error in a direction of no curvature, and ends the solve.

    Raises:
        torch.linalg.LinAlgError: negative curvature.
    """
    x = torch.zeros_like(rhs, memory_format=torch.contiguous_format)
    r = rhs.clone(memory_format=torch.contiguous_format)
    z = r if precondition is None else precondition(r)
    p = z.clone()
    # Views: the updates below are in place.
    flat_x, flat_r, flat_p = x.view(-1), r.view(-1), p.view(-1)
    squared = torch.dot(flat_r, flat_r).item()
    slope = squared if precondition is None else torch.dot(flat_r, z.view(-1)).item()
    norms = [math.sqrt(squared)]
    if norms[0] <= target:
        return x, r, 0, False
    for iteration in range(1, max_iter + 1):
        image = matmul(p)
        if image is None:
            return x, r, iteration - 1, False
        q = image.reshape(-1)
        bend = torch.dot(flat_p, q).item()
        if not bend > 0:
            if indefinite and bend < 0:
                raise torch.linalg.LinAlgError(
                    f"the damped Hessian is not positive definite (curvature {bend:.3g} along a direction of iteration "
                    f"{iteration}): some weights are negative; raise damping"
                )
            return x, r, iteration, False
        step = slope / bend
        flat_x.add_(flat_p, alpha=step)
        flat_r.sub_(q, alpha=step)
        squared = torch.dot(flat_r, flat_r).item()
        norms.append(math.sqrt(squared))
        if norms[-1] <= target:
            return x, r, iteration, False
        if give_up is not None and give_up(norms):
            return x, r, iteration, True
        if precondition is None:
            previous, slope = slope, squared
            flat_p.mul_(slope / previous).add_(flat_r)
        else:
            z = precondition(r)
            previous, slope = slope, torch.dot(flat_r, z.view(-1)).item()
            if not slope > 0:
                return x, r, iteration, False
            p.mul_(slope / previous).add_(z)
    return x, r, max_iter, False


class Together:
    """The operator of a system whose rows live on several processes: None as soon as one of them has ended its solve.

    A process that ends says so in the all-reduce with which the others would go on, so all end at the same iterate.

    Args:
        system: the damped Hessian.
    """

    def __init__(self, system: DampedHessian) -> None:
        self._system = system
        self._over = False

    def __call__(self, direction: Tensor) -> Tensor | None:
        """``(H + damping I) V``."""
        image, leaving = self._system.carry(direction, 0.0)
        self._over = leaving.item() > 0
        return None if self._over else image

    def leave(self) -> None:
        """After the solve."""
        if not self._over:
            self._system.carry(self._system.features.new_zeros(self._system.num_unknowns), 1.0)
