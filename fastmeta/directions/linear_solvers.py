"""Solvers for ``B x = v`` with a positive definite B that is known by its products alone, on flat vectors.

They work for the parameters of a whole model: nothing here is larger than a few copies of the vector.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastmeta.ops.process_group import Group, world_size
from fastmeta.ops.solve import conjugate_gradient as cg
from fastmeta.ops.solve.system import Joined

Product = Callable[[Tensor], Tensor]  # v [P] to B v [P]

# Products of the power iteration that finds the step of a Neumann series.
POWER_ITERATIONS = 10
TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Solved:
    """How a solution was reached."""

    made: int | Tensor
    relative: float | Tensor

    @property
    def iterations(self) -> int:
        """Products with B that the solution is made of; those of a power iteration are not counted."""
        return int(self.made)

    @property
    def residual(self) -> float:
        """``||v - B x|| / ||v||`` as the recurrence has it; of a Neumann series that of the terms before the last."""
        return float(self.relative)


class Solution(NamedTuple):
    """What a solver found."""

    vector: Tensor  # x [P]
    solved: Solved
    indefinite: bool | Tensor = False  # negative curvature ended it


def conjugate_gradient(product: Product, rhs: Tensor, *, tol: float, max_iter: int, group: Group = None) -> Solution:
    """Conjugate gradients from ``x = 0`` until ``||v - B x|| <= tol ||v||``.

    The host looks at the status after every product on a CPU; on a GPU after every fifth.

    Args:
        product: B, equal on all processes of the group.
        rhs: v, ``[P]``.
        tol: relative residual to reach.
        max_iter: most products.
        group: processes that must stop together.
    """
    length = _norm(rhs)
    outcome = cg.conjugate_gradient(
        product,
        rhs,
        target=tol * length,
        max_iter=max_iter,
        updates=cg.updates_for(rhs, None),
        look=_check_every(rhs),
        shared=None if group is None else _Shared(product, rhs, group),
    )
    row = outcome.row
    assert isinstance(row, list), "not captured"
    relative = (row[cg.SQUARED] ** 0.5) / max(float(length), TINY)
    return Solution(outcome.solution, Solved(int(row[cg.COUNT]), relative), row[cg.STATUS] == cg.NEGATIVE)


def neumann(
    product: Product, rhs: Tensor, *, tol: float, max_iter: int, step: float | None = None, group: Group = None
) -> Solution:
    """``alpha sum_{j<=J} (I - alpha B)^j v``, which goes to ``B^{-1} v`` for ``0 < alpha < 2 / ||B||``.

    Lorraine et al. (2020), Algorithm 3. The last power ``(I - alpha B)^J v`` is the residual of the terms
    before it; below ``tol ||v||`` the series ends.

    Args:
        product: B, equal on all processes of the group.
        rhs: v, ``[P]``.
        tol: relative residual at which it ends.
        max_iter: J, products with B.
        step: alpha; None: one over the largest eigenvalue, by some more products of a power iteration from v.
        group: processes that must stop together.
    """
    alpha: float | Tensor = 1 / _largest_eigenvalue(product, rhs) if step is None else step
    power, total = rhs.clone(), rhs.clone()
    length = _norm(rhs).clamp_min(TINY)
    looks = not cg.capturing(rhs)
    joined = _joined(rhs, group)
    iterations, residual = 0, torch.ones_like(length)
    for iteration in range(1, max_iter + 1):
        power -= alpha * product(power)
        total += power
        iterations = iteration
        if not looks or (iteration % _check_every(rhs) and iteration < max_iter):
            continue
        residual = _norm(power) / length
        seen = residual if joined is None else joined.first(residual)
        if not tol < float(seen) < float("inf"):
            break
    return Solution(alpha * total, Solved(iterations, residual if looks else _norm(power) / length))


def _largest_eigenvalue(product: Product, vector: Tensor) -> Tensor:
    tiny = torch.finfo(vector.dtype).tiny
    value = vector.new_ones(())
    for _ in range(POWER_ITERATIONS):
        vector = product(vector / torch.linalg.vector_norm(vector).clamp_min(tiny))
        value = torch.linalg.vector_norm(vector)
    return torch.where(value > 0, value, 1)


class _Shared:
    """B for processes that stop together."""

    def __init__(self, product: Product, rhs: Tensor, group: Group) -> None:
        self.joined = _joined(rhs, group)
        self._product = product

    def carry(self, direction: Tensor, number: Tensor | float) -> tuple[Tensor, Tensor]:
        """``B v`` and the sum of a small integer over the processes."""
        assert self.joined is not None
        (total,) = self.joined.sum(direction.new_zeros(()).add_(number))
        if total.item() > 0:
            return direction, total  # the end: nobody uses the product
        return self._product(direction), total


def _joined(rhs: Tensor, group: Group) -> Joined | None:
    return None if group is None else Joined(group, [0] * world_size(group), False, rhs.device)


def _check_every(vector: Tensor) -> int:
    """A look costs nothing on a CPU, and an iteration too many a pass through the model."""
    return 1 if vector.is_cpu else cg.LOOK_EVERY


def _norm(vector: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vector, dtype=torch.float64)
