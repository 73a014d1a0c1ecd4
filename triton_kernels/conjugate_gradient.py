"""The vector updates of conjugate gradients, each one pass over memory, with every scalar read from the device.

An iteration is ``bend = <p, q>``, then ``x += a p, r -= a q, <r, r>`` with ``a = slope / bend``, then ``p = z + b p``.
``x``, ``p`` and ``z`` may be longer than ``r`` and ``q``, which inner products end with.
A sum over the vector is written as one partial sum for each program, in float64, and added up by every program of the
kernel that needs it: the order is fixed, nothing is atomic. An iteration reads one row of scalars and writes another,
so that no program reads what another one writes. Once the status is not ``RUNNING``, nothing changes.
"""

from collections.abc import Hashable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmeta.ops.solve import conjugate_gradient as scalars
from fastmeta.triton_kernels import _launch as executor
from fastmeta.triton_kernels._program import INTERPRETED, Program, Ref, is_recording, launch

_BLOCK = 1024  # entries in one step of a program, 4 warps
# Most programs: every program of the next kernel reads all of their sums, 4 kB.
_MOST_PROGRAMS = 512
_MOST_PLANS = 1024

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


_PLANS: dict[Hashable, Any] = {}


def _launch(kernel: Any, vector: Tensor, programs: int, tensors: tuple[Tensor, ...], sizes: tuple[int, ...]) -> None:
    """Go over a vector like this; a kernel that adds up partial sums adds those of as many programs."""
    counts = {} if kernel is _dot else {"count": programs, "padded": triton.next_power_of_2(programs)}

    def plan() -> Program:
        steps = triton.cdiv(triton.cdiv(vector.numel(), _BLOCK), programs)
        arguments = (*(Ref("input", index) for index in range(len(tensors))), *sizes)
        constants = {"steps": steps, **counts, "block": _BLOCK}
        return Program((), (), (launch(kernel, (programs,), arguments, constants, num_stages=2),))

    if INTERPRETED or is_recording():
        plan().run(tensors)
        return
    alignments = tuple(tensor.data_ptr() % 16 for tensor in tensors)
    key = kernel, vector.device, vector.dtype, sizes, programs, alignments
    with torch.cuda.device(vector.device):
        if key not in _PLANS:
            if len(_PLANS) >= _MOST_PLANS:
                _PLANS.clear()
            _PLANS[key] = executor.compile(plan(), tensors, ())
        executor.run(_PLANS[key], tensors, ())


def _aligned(vector: Tensor) -> Tensor:
    """Contiguous, and at a multiple of 16 bytes as the kernels were compiled for."""
    vector = vector.contiguous()
    return vector if vector.data_ptr() % 16 == 0 else vector.clone()


def num_partials(vector: Tensor) -> int:
    """Number of partial sums over a vector like this."""
    return _programs(vector.numel())


def dot(a: Tensor, b: Tensor, partials: Tensor, now: Tensor) -> None:
    """``<a, b>`` over the entries that both have, as ``partials [num_partials]``, float64."""
    shorter = min(a, b, key=Tensor.numel)
    _launch(_dot, shorter, partials.numel(), (_aligned(a), _aligned(b), partials, now), (shorter.numel(),))


def advance(x: Tensor, r: Tensor, p: Tensor, q: Tensor, bends: Tensor, squares: Tensor, now: Tensor) -> None:
    """``x += a p``, ``r -= a q`` in place for ``a = slope / bend``; ``<r, r>`` as partial sums in ``squares``."""
    tensors = (x, r, p, _aligned(q), bends, squares, now)
    _launch(_advance, x, bends.numel(), tensors, (r.numel(), x.numel()))


def turn(p: Tensor, z: Tensor, bends: Tensor, squares: Tensor, slopes: Tensor, now: Tensor, following: Tensor) -> None:
    """``p = z + b p`` in place for ``b = <r, z> / slope``, with ``<r, z>`` as partial sums in ``slopes``.

    Writes the row of numbers ``following`` from the row ``now``.
    """
    tensors = (p, _aligned(z), bends, squares, slopes, now, following)
    _launch(_turn, p, bends.numel(), tensors, (p.numel(),))
