"""Conjugate gradients whose iterations never wait for the host: every scalar stays on the device."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastmeta import _conjugate_gradient_scalars as scalars
from fastmeta.ops._solvers.joined import Joined
from fastmeta.ops._solvers.updates import Updates

# Iterations launched between two looks at the status. A look costs the time from the device to the host and back; an
# iteration launched after the solve has stopped costs a Hessian-vector product that changes nothing.
CHECK_EVERY = 5


class Shared(Protocol):
    """An operator that several processes apply together."""

    joined: Joined | None

    def carry(self, direction: Tensor, number: Tensor | float) -> tuple[Tensor, Tensor]:
        """The product, and the sum of a small integer over the processes."""


class Outcome(NamedTuple):
    """``x`` and the last row of scalars (``fastmeta/_conjugate_gradient_scalars.py``)."""

    solution: Tensor  # [C, r]
    row: Tensor  # [8], float64
    read: list[float] | None  # the row on the host; None if it was not read


def conjugate_gradient(
    matmul: Callable[[Tensor], Tensor],
    rhs: Tensor,  # [C, r]
    *,
    target: Tensor,  # []
    max_iter: int,
    updates: Updates,
    precondition: Callable[[Tensor], Tensor] | None = None,
    fixed: bool = False,
    check_every: int = CHECK_EVERY,
    shared: Shared | None = None,
) -> Outcome:
    """Solve ``matmul(x) = rhs`` from ``x = 0`` until the norm of the residual is at most ``target``.

    Negative curvature, none, and numbers that are not finite stop the solve; ``x`` stays as it then is.

    Args:
        matmul: the symmetric operator.
        rhs: right-hand side; not changed.
        target: norm of the residual to reach, float64 on the device of ``rhs``.
        max_iter: most products with ``matmul``.
        updates: the vector updates.
        precondition: approximate inverse; None is the identity.
        fixed: launch ``max_iter`` iterations and never look whether the solve has stopped, as a CUDA graph must.
        check_every: iterations between two looks.
        shared: the operator as one that several processes apply together, all of which stop with the first one.
    """
    x = torch.zeros_like(rhs, memory_format=torch.contiguous_format)
    r = rhs.clone(memory_format=torch.contiguous_format)
    z = r if precondition is None else precondition(r)
    p = z.clone(memory_format=torch.contiguous_format)
    count = updates.num_partials(r)
    rows = torch.zeros(2, scalars.ROW, dtype=torch.float64, device=rhs.device).unbind()
    # The rows of partial sums begin at multiples of 16 bytes.
    partials = torch.zeros(3, count + count % 2, dtype=torch.float64, device=rhs.device)
    bends, squares, slopes = partials[:, :count]
    updates.dot(r, r, squares, rows[0])
    if precondition is None:
        slopes = squares
    else:
        updates.dot(r, z, slopes, rows[0])
    _start(rows[0], squares.sum(), slopes.sum(), target)
    row = rows[0]
    for iteration in range(max_iter):
        now, following = rows[iteration % 2], rows[1 - iteration % 2]
        q = matmul(p) if shared is None else _shared_product(shared, p, now)
        updates.dot(p, q, bends, now)
        updates.advance(x, r, p, q, bends, squares, now)
        if precondition is not None:
            z = precondition(r)
            updates.dot(r, z, slopes, now)
        updates.turn(p, z, bends, squares, slopes, now, following)
        row = following
        looks = not fixed and (iteration + 1) % check_every == 0
        if looks and status_of(_seen(row, shared)).item() != scalars.RUNNING:
            break
    x.masked_fill_(status_of(row) == scalars.NOT_FINITE, torch.nan)
    return Outcome(x, row, None if fixed else _seen(row, shared).tolist())


def status_of(row: Tensor) -> Tensor:
    """One of the numbers from ``RUNNING`` on. Scalar."""
    return row[scalars.STATUS]


def _shared_product(system: Shared, p: Tensor, row: Tensor) -> Tensor:
    """The product, and the first process's status for the row of every process."""
    assert system.joined is not None
    image, status = system.carry(p, status_of(row) if system.joined.is_first else 0.0)
    row[scalars.STATUS] = status
    return image


def _seen(row: Tensor, shared: Shared | None) -> Tensor:
    """The row that every host looks at."""
    return row if shared is None or shared.joined is None else shared.joined.first(row)


def _start(row: Tensor, squared: Tensor, slope: Tensor, target: Tensor) -> None:
    square = target.square()
    status = torch.where(slope > 0, scalars.RUNNING, scalars.FLAT)
    status = torch.where(squared <= square, scalars.CONVERGED, status)
    status = torch.where(squared < torch.inf, status, scalars.NOT_FINITE)
    for place, value in (
        (scalars.SLOPE, slope),
        (scalars.SQUARED, squared),
        (scalars.TARGET, square),
        (scalars.STATUS, status),
    ):
        row[place] = value
