"""The vector updates of conjugate gradients, each one pass over memory, with every scalar read from the device.

An iteration is ``bend = <p, q>``, then ``x += a p, r -= a q, <r, r>`` with ``a = slope / bend``, then ``p = z + b p``.
A sum over the vector is written as one partial sum for each program, in float64, and added up by every program of the
kernel that needs it: the order is fixed, nothing is atomic. An iteration reads one row of scalars and writes another,
so that no program reads what another one writes. Once the status is not ``RUNNING``, nothing changes.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastmeta import _conjugate_gradient_scalars as scalars
from fastmeta.triton_kernels._launch import Launch, Plans, on_device

_BLOCK = 1024  # entries in one step of a program, 4 warps
# Most programs: every program of the next kernel reads all of their sums, 4 kB.
_MOST_PROGRAMS = 512

_SLOPE: tl.constexpr = tl.constexpr(scalars.SLOPE)
_SQUARED: tl.constexpr = tl.constexpr(scalars.SQUARED)
_TARGET: tl.constexpr = tl.constexpr(scalars.TARGET)
_COUNT: tl.constexpr = tl.constexpr(scalars.COUNT)
_STATUS: tl.constexpr = tl.constexpr(scalars.STATUS)
_RUNNING: tl.constexpr = tl.constexpr(scalars.RUNNING)
_CONVERGED: tl.constexpr = tl.constexpr(scalars.CONVERGED)
_NEGATIVE: tl.constexpr = tl.constexpr(scalars.NEGATIVE)
_FLAT: tl.constexpr = tl.constexpr(scalars.FLAT)
_NOT_FINITE: tl.constexpr = tl.constexpr(scalars.NOT_FINITE)


@triton.jit
def _offsets(step, block: tl.constexpr):
    first = (step * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * block
    return first + tl.arange(0, block)


@triton.jit
def _total(partials_ptr, count: tl.constexpr, padded: tl.constexpr):
    """The sum of the programs' partial sums, in a fixed order."""
    place = tl.arange(0, padded)
    return tl.sum(tl.load(partials_ptr + place, place < count, 0.0), 0)


@triton.jit
def _dot(a_ptr, b_ptr, partials_ptr, now_ptr, size, steps: tl.constexpr, block: tl.constexpr):
    """``<a, b>`` as partial sums."""
    if tl.load(now_ptr + _STATUS) == _RUNNING:
        total = tl.zeros([block], a_ptr.dtype.element_ty)
        for step in range(steps):
            at = _offsets(step, block)
            inside = at < size
            total += tl.load(a_ptr + at, inside, 0.0) * tl.load(b_ptr + at, inside, 0.0)
        tl.store(partials_ptr + tl.program_id(0), tl.sum(total, 0).to(tl.float64))


@triton.jit
def _advance(
    x_ptr, r_ptr, p_ptr, q_ptr, bends_ptr, squares_ptr, now_ptr, size,
    steps: tl.constexpr, count: tl.constexpr, padded: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """``x += a p``, ``r -= a q``, and ``<r, r>`` as partial sums."""
    bend = _total(bends_ptr, count, padded)
    # NaN passes, so that it reaches x.
    if (tl.load(now_ptr + _STATUS) == _RUNNING) & ~(bend <= 0):
        length = (tl.load(now_ptr + _SLOPE) / bend).to(x_ptr.dtype.element_ty)
        total = tl.zeros([block], x_ptr.dtype.element_ty)
        for step in range(steps):
            at = _offsets(step, block)
            inside = at < size
            x = tl.load(x_ptr + at, inside, 0.0) + length * tl.load(p_ptr + at, inside, 0.0)
            tl.store(x_ptr + at, x, inside)
            r = tl.load(r_ptr + at, inside, 0.0) - length * tl.load(q_ptr + at, inside, 0.0)
            tl.store(r_ptr + at, r, inside)
            total += r * r
        tl.store(squares_ptr + tl.program_id(0), tl.sum(total, 0).to(tl.float64))


@triton.jit
def _turn(
    p_ptr, z_ptr, bends_ptr, squares_ptr, slopes_ptr, now_ptr, next_ptr, size,
    steps: tl.constexpr, count: tl.constexpr, padded: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """``p = z + b p`` and the next row of scalars."""
    bend = _total(bends_ptr, count, padded)
    squared = _total(squares_ptr, count, padded)
    slope = _total(slopes_ptr, count, padded)
    before = tl.load(now_ptr + _STATUS)
    target = tl.load(now_ptr + _TARGET)
    # The first that holds, from the last line up.
    status = tl.where(slope > 0, _RUNNING, _FLAT)
    status = tl.where(squared <= target, _CONVERGED, status)
    status = tl.where(squared < float("inf"), status, _NOT_FINITE)
    status = tl.where(bend == 0, _FLAT, status)
    status = tl.where(bend < 0, _NEGATIVE, status)
    running = before == _RUNNING
    status = tl.where(running, status.to(tl.float64), before)
    moved = running & ~(bend <= 0)
    if tl.program_id(0) == 0:
        tl.store(next_ptr + _SLOPE, slope)
        tl.store(next_ptr + _SQUARED, tl.where(moved, squared, tl.load(now_ptr + _SQUARED)))
        tl.store(next_ptr + _TARGET, target)
        tl.store(next_ptr + _COUNT, tl.load(now_ptr + _COUNT) + tl.where(running, 1.0, 0.0))
        tl.store(next_ptr + _STATUS, status)
    if status == _RUNNING:
        ratio = (slope / tl.load(now_ptr + _SLOPE)).to(p_ptr.dtype.element_ty)
        for step in range(steps):
            at = _offsets(step, block)
            inside = at < size
            p = tl.load(z_ptr + at, inside, 0.0) + ratio * tl.load(p_ptr + at, inside, 0.0)
            tl.store(p_ptr + at, p, inside)


class _Plan:
    """The launches for vectors of one size and dtype."""

    def __init__(self, size: int) -> None:
        blocks = triton.cdiv(size, _BLOCK)
        self.programs = max(1, min(blocks, _MOST_PROGRAMS))
        self.size = size
        steps = {"steps": triton.cdiv(blocks, self.programs)}
        sums = {"count": self.programs, "padded": triton.next_power_of_2(self.programs)}
        block = {"block": _BLOCK}
        grid = (self.programs,)
        self.dot = Launch(_dot, grid, steps | block)
        self.advance = Launch(_advance, grid, steps | sums | block)
        self.turn = Launch(_turn, grid, steps | sums | block)


_PLANS: Plans[_Plan] = Plans()


def _plan(vector: Tensor) -> _Plan:
    key = vector.device, vector.dtype, vector.numel()
    return _PLANS.get(key) or _PLANS.keep(key, _Plan(vector.numel()))


def _aligned(vector: Tensor) -> Tensor:
    """Contiguous, and at a multiple of 16 bytes as the kernels were compiled for."""
    vector = vector.contiguous()
    return vector if vector.data_ptr() % 16 == 0 else vector.clone()


def num_partials(vector: Tensor) -> int:
    """Number of partial sums over a vector like this."""
    return _plan(vector).programs


@on_device
def dot(a: Tensor, b: Tensor, partials: Tensor, now: Tensor) -> None:
    """``<a, b>`` as ``partials [num_partials]``, float64."""
    plan = _plan(a)
    plan.dot(_aligned(a), _aligned(b), partials, now, plan.size)


@on_device
def advance(x: Tensor, r: Tensor, p: Tensor, q: Tensor, bends: Tensor, squares: Tensor, now: Tensor) -> None:
    """``x += a p``, ``r -= a q`` in place for ``a = slope / bend``; ``<r, r>`` as partial sums in ``squares``."""
    plan = _plan(x)
    plan.advance(x, r, p, _aligned(q), bends, squares, now, plan.size)


@on_device
def turn(p: Tensor, z: Tensor, bends: Tensor, squares: Tensor, slopes: Tensor, now: Tensor, following: Tensor) -> None:
    """``p = z + b p`` in place for ``b = <r, z> / slope``, with ``<r, z>`` as partial sums in ``slopes``.

    Writes the row of scalars ``following`` from the row ``now``.
    """
    plan = _plan(p)
    plan.turn(p, _aligned(z), bends, squares, slopes, now, following, plan.size)
