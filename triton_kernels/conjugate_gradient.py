"""The vector updates of conjugate gradients, each one pass over memory, with every scalar read from the device.

An iteration is ``bend = <p, q>``, then ``x += a p, r -= a q, <r, r>`` with ``a = slope / bend``, then ``p = z + b p``.
``x``, ``p`` and ``z`` may be longer than ``r`` and ``q``, which inner products end with.
A sum over the vector is written as one partial sum for each program, in float64, and added up by every program of the
kernel that needs it: the order is fixed, nothing is atomic. An iteration reads one row of scalars and writes another,
so that no program reads what another one writes. Once the status is not ``RUNNING``, nothing changes.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastmeta.ops.solve import conjugate_gradient as scalars
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
    x_ptr, r_ptr, p_ptr, q_ptr, bends_ptr, squares_ptr, now_ptr, size, wide,
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
            x = tl.load(x_ptr + at, at < wide, 0.0) + length * tl.load(p_ptr + at, at < wide, 0.0)
            tl.store(x_ptr + at, x, at < wide)
            inside = at < size
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


def _programs(size: int) -> int:
    return max(1, min(triton.cdiv(size, _BLOCK), _MOST_PROGRAMS))


_PLANS: Plans[Launch] = Plans()


def _plan(kernel: Any, vector: Tensor, programs: int, *, sums: bool, size: int = 0) -> Launch:
    """The launch of a kernel that goes over a vector like this; with ``sums`` it adds up those of as many programs."""
    key = kernel, vector.device, vector.dtype, vector.numel(), programs, size
    found = _PLANS.get(key)
    if found is None:
        counts = {"count": programs, "padded": triton.next_power_of_2(programs)} if sums else {}
        steps = triton.cdiv(triton.cdiv(vector.numel(), _BLOCK), programs)
        found = _PLANS.keep(key, Launch(kernel, (programs,), {"steps": steps, **counts, "block": _BLOCK}))
    return found


def _aligned(vector: Tensor) -> Tensor:
    """Contiguous, and at a multiple of 16 bytes as the kernels were compiled for."""
    vector = vector.contiguous()
    return vector if vector.data_ptr() % 16 == 0 else vector.clone()


def num_partials(vector: Tensor) -> int:
    """Number of partial sums over a vector like this."""
    return _programs(vector.numel())


@on_device
def dot(a: Tensor, b: Tensor, partials: Tensor, now: Tensor) -> None:
    """``<a, b>`` over the entries that both have, as ``partials [num_partials]``, float64."""
    shorter = min(a, b, key=Tensor.numel)
    launch = _plan(_dot, shorter, partials.numel(), sums=False)
    launch(_aligned(a), _aligned(b), partials, now, shorter.numel())


@on_device
def advance(x: Tensor, r: Tensor, p: Tensor, q: Tensor, bends: Tensor, squares: Tensor, now: Tensor) -> None:
    """``x += a p``, ``r -= a q`` in place for ``a = slope / bend``; ``<r, r>`` as partial sums in ``squares``."""
    launch = _plan(_advance, x, bends.numel(), sums=True, size=r.numel())
    launch(x, r, p, _aligned(q), bends, squares, now, r.numel(), x.numel())


@on_device
def turn(p: Tensor, z: Tensor, bends: Tensor, squares: Tensor, slopes: Tensor, now: Tensor, following: Tensor) -> None:
    """``p = z + b p`` in place for ``b = <r, z> / slope``, with ``<r, z>`` as partial sums in ``slopes``.

    Writes the row of numbers ``following`` from the row ``now``.
    """
    launch = _plan(_turn, p, bends.numel(), sums=True)
    launch(p, _aligned(z), bends, squares, slopes, now, following, p.numel())
