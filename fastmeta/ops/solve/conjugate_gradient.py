"""Conjugate gradients, one algorithm for the CPU, for a GPU, and for a CUDA graph.

What differs is where the numbers of an iteration live, and how often the host looks at them (:func:`look_every`). On
the CPU they are Python floats, looked at in every iteration. On a GPU they are a row of float64 on the device, where a
look costs the way there and back: every few iterations, or once where all are one launch (:func:`in_one_launch`), and
never while a CUDA graph is captured. The row is::

    SLOPE    <r, z>
    SQUARED  <r, r>, or <r, z> where that is the squared norm of the residual (``energy``)
    TARGET   what SQUARED is to fall to
    COUNT    iterations made
    STATUS   RUNNING, or why it stopped

Once the status is not RUNNING nothing changes any more.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastmeta import _extension, dispatch

SLOPE, SQUARED, TARGET, COUNT, STATUS = range(5)
ROW = 8  # numbers in a row: 64 bytes keep the rows aligned

RUNNING = 0
CONVERGED = 1
NEGATIVE = 2  # curvature below zero along a direction
FLAT = 3  # no curvature along a direction, or a preconditioner at the end of its precision
NOT_FINITE = 4
STOPPED = 5  # another process did

# Iterations launched on a GPU between two looks. An iteration launched after the solve has stopped costs a product that
# changes nothing.
LOOK_EVERY = 5
# The recurrence drifts from the true residual: stop it a little below the tolerance.
MARGIN = 0.95
# Entries of a solution up to which one launch makes every iteration.
MOST_IN_ONE_LAUNCH = 2**17
# A pass that leaves more than this part of the true residual is at the precision of the dtype.
STAGNATION = 0.5


def serves(tensor: Tensor) -> bool:
    """Whether the numbers of a solve with this tensor stay on the device."""
    return tensor.is_cuda


def capturing(tensor: Tensor) -> bool:
    """Whether work on this tensor is being captured in a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def look_every(tensor: Tensor) -> int:
    """Iterations between two looks of the host at the status; 0: it never looks."""
    if capturing(tensor):
        return 0
    return LOOK_EVERY if serves(tensor) else 1


def _fake(features: Tensor, logits: Tensor, targets: Any, signs: Any, rhs: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rhs), rhs.new_empty(ROW, dtype=torch.float64)


OPERATOR = dispatch.Operator("conjugate_gradient", fake=_fake)
"""All of a solve with ``damping > 0`` on CUDA: ``x [C, K]`` and the last row of numbers.

Its arguments: rows ``[N, K]`` of the system, logits ``[N, C]``, targets ``[N, C]`` or None, signs of the weights
``[N]`` or None, right-hand side ``[C, K]``, the norm of the residual to reach (float64, on the device), the code of the
loss, damping, and the most iterations.
"""


class Shared(Protocol):
    """An operator that several processes apply together."""

    def carry(self, direction: Tensor, number: Tensor | float) -> tuple[Tensor, Tensor]:
        """The product, and the sum of a small integer over the processes."""


class Outcome(NamedTuple):
    """``x`` and the last row of numbers, on the host if it has looked."""

    solution: Tensor
    row: list[float] | Tensor


class Updates(Protocol):
    """The vector updates of an iteration, with every number on the device: a module or object with these functions.

    ``x``, ``p`` and ``z`` may be longer than ``r`` and ``q``; inner products are those of the first entries.
    """

    def num_partials(self, vector: Tensor) -> int:
        """Number of partial sums over a vector like this."""

    def dot(self, a: Tensor, b: Tensor, partials: Tensor, now: Tensor) -> None:
        """``<a, b>`` as partial sums, float64."""

    def advance(self, x: Tensor, r: Tensor, p: Tensor, q: Tensor, bends: Tensor, squares: Tensor, now: Tensor) -> None:
        """``x += a p``, ``r -= a q`` in place for ``a = slope / bend``; ``<r, r>`` as partial sums."""

    def turn(
        self, p: Tensor, z: Tensor, bends: Tensor, squares: Tensor, slopes: Tensor, now: Tensor, following: Tensor
    ) -> None:
        """``p = z + b p`` in place for ``b = <r, z> / slope``, and the row of numbers after the row ``now``."""


def conjugate_gradient(
    matmul: Callable[[Tensor], Tensor],
    rhs: Tensor,
    *,
    target: Tensor | float,
    max_iter: int,
    updates: Updates | None = None,
    precondition: Callable[[Tensor], Tensor] | None = None,
    energy: bool = False,
    look: int = 1,
    shared: Shared | None = None,
) -> Outcome:
    """Solve ``matmul(x) = rhs`` from ``x = 0`` until the norm of the residual is at most ``target``.

    Negative curvature, none, and numbers that are not finite stop the solve; ``x`` stays as it then is.

    Args:
        matmul: the symmetric operator.
        rhs: right-hand side; not changed.
        target: norm of the residual to reach; for ``updates`` a float64 scalar on the device of ``rhs``.
        max_iter: most products with ``matmul``.
        updates: the vector updates; None: the numbers are the host's, as on the CPU.
        precondition: approximate inverse; None is the identity. Its result ``z`` may go on behind the entries of ``r``
            with vectors that ``x`` and ``p`` are to follow by the same steps; ``matmul`` then is given all of ``p``.
        energy: the residual's norm is ``sqrt(<r, z>)`` in place of ``sqrt(<r, r>)``.
        look: iterations between two looks at the status; 0: none, and ``max_iter`` iterations run.
        shared: the operator in place of ``matmul``, applied by several processes, all of which stop with the first.
    """
    vectors: Any
    if updates is None:
        vectors = _OnHost(rhs, float(target), precondition, energy)
        max_iter = 0 if shared is None and vectors.over() else max_iter
    else:
        vectors = _OnDevice(rhs, target, precondition, energy, updates)
    for iteration in range(max_iter):
        if shared is None:
            q = matmul(vectors.p)
        else:
            # Who has ended says so in the all-reduce with which the others would go on: all end at the same iterate.
            q, over = shared.carry(vectors.p, vectors.flag())
            vectors.stop(over)
            if look and iteration % look == 0 and over.item() > 0:
                break
        vectors.advance(q)
        vectors.turn(precondition)
        if look and shared is None and (iteration + 1) % look == 0 and vectors.over():
            break
    return vectors.outcome(read=look > 0)


class _OnHost:
    """The vectors and numbers of a solve whose numbers are floats."""

    def __init__(
        self, rhs: Tensor, target: float, precondition: Callable[[Tensor], Tensor] | None, energy: bool
    ) -> None:
        self.r = rhs.clone(memory_format=torch.contiguous_format)
        z = self.r if precondition is None else precondition(self.r)
        self.p = z.clone(memory_format=torch.contiguous_format)
        self.x = torch.zeros_like(self.p)
        # Views: the updates are in place.
        self._flat_x, self._flat_r, self._flat_p = self.x.view(-1), self.r.view(-1), self.p.view(-1)
        self._size = self.r.numel()
        self._longer = self.p.numel() > self._size
        self._head = self._flat_p[: self._size]
        self._energy = energy
        self._target = target * target
        self._slope = torch.dot(self._flat_r, self._head).item()
        self._squared = self._slope if energy else torch.dot(self._flat_r, self._flat_r).item()
        self._count = 0
        self._status = self._judged()
        if self._status == RUNNING and not self._slope > 0:
            self._status = FLAT

    def _judged(self) -> int:
        if self._squared <= self._target:
            return CONVERGED
        return RUNNING if self._squared < math.inf else NOT_FINITE

    def over(self) -> bool:
        return self._status != RUNNING

    def flag(self) -> float:
        if self._status == RUNNING:
            return 0.0
        self.p.zero_()  # nobody uses the product of the others' last all-reduce
        return 1.0

    def stop(self, over: Tensor) -> None:
        if self._status == RUNNING and over.item() > 0:
            self._status = STOPPED

    def advance(self, q: Tensor) -> None:
        self._count += 1
        q = q.reshape(-1)
        bend = torch.dot(self._head, q).item()
        if not bend > 0:
            self._status = NEGATIVE if bend < 0 else FLAT if bend == 0 else NOT_FINITE
            return
        step = self._slope / bend
        self._flat_x.add_(self._flat_p, alpha=step)
        self._flat_r.sub_(q, alpha=step)
        if not self._energy:
            self._squared = torch.dot(self._flat_r, self._flat_r).item()
            self._status = self._judged()

    def turn(self, precondition: Callable[[Tensor], Tensor] | None) -> None:
        if self._status != RUNNING:
            return
        z, slope = self._flat_r, self._squared
        if precondition is not None:
            z = precondition(self.r).view(-1)
            slope = torch.dot(self._flat_r, z[: self._size] if self._longer else z).item()
        if self._energy:
            self._squared = slope
            self._status = self._judged()
        elif not slope > 0:
            self._status = FLAT
        if self._status == RUNNING:
            self._flat_p.mul_(slope / self._slope).add_(z)
            self._slope = slope

    def outcome(self, read: bool) -> Outcome:
        if self._status == NOT_FINITE:
            self.x.fill_(math.nan)
        return Outcome(self.x, [self._slope, self._squared, self._target, self._count, self._status])


class _OnDevice:
    """The vectors and numbers of a solve that waits for nothing."""

    def __init__(
        self,
        rhs: Tensor,
        target: Tensor | float,
        precondition: Callable[[Tensor], Tensor] | None,
        energy: bool,
        updates: Updates,
    ) -> None:
        self.r = rhs.clone(memory_format=torch.contiguous_format)
        z = self.r if precondition is None else precondition(self.r)
        self.p = z.clone(memory_format=torch.contiguous_format)
        self.x = torch.zeros_like(self.p)
        self._updates = updates
        count = updates.num_partials(self.r)
        self._now, self._following = torch.zeros(2, ROW, dtype=torch.float64, device=rhs.device).unbind()
        # The rows of partial sums begin at multiples of 16 bytes.
        partials = torch.zeros(3, count + count % 2, dtype=torch.float64, device=rhs.device)
        self._bends, self._squares, self._slopes = partials[:, :count]
        self._own_slopes = precondition is not None
        if energy:
            self._squares = self._slopes
        elif not self._own_slopes:
            self._slopes = self._squares
        # Of the norm, kept apart: ``advance`` writes it whether it is asked for or not.
        self._lengths = partials[1, :count]
        updates.dot(self.r, self.r, self._lengths, self._now)
        if self._own_slopes:
            updates.dot(self.r, z, self._slopes, self._now)
        self._start(self._squares.sum(), self._slopes.sum(), target)

    def _start(self, squared: Tensor, slope: Tensor, target: Tensor | float) -> None:
        square = torch.full_like(squared, target * target) if isinstance(target, float) else target.square()
        status = torch.where(slope > 0, RUNNING, FLAT)
        status = torch.where(squared <= square, CONVERGED, status)
        status = torch.where(squared < torch.inf, status, NOT_FINITE)
        for place, value in ((SLOPE, slope), (SQUARED, squared), (TARGET, square), (STATUS, status)):
            self._now[place] = value

    def over(self) -> bool:
        return self._now[STATUS].item() != RUNNING

    def flag(self) -> Tensor:
        return self._now[STATUS] != RUNNING

    def stop(self, over: Tensor) -> None:
        status = self._now[STATUS]
        self._now[STATUS] = torch.where((status == RUNNING) & (over > 0), STOPPED, status)

    def advance(self, q: Tensor) -> None:
        self._updates.dot(self.p, q, self._bends, self._now)
        self._updates.advance(self.x, self.r, self.p, q, self._bends, self._lengths, self._now)

    def turn(self, precondition: Callable[[Tensor], Tensor] | None) -> None:
        z = self.r
        if precondition is not None:
            z = precondition(self.r)
            self._updates.dot(self.r, z, self._slopes, self._now)
        self._updates.turn(self.p, z, self._bends, self._squares, self._slopes, self._now, self._following)
        self._now, self._following = self._following, self._now

    def outcome(self, read: bool) -> Outcome:
        self.x.masked_fill_(self._now[STATUS] == NOT_FINITE, torch.nan)
        return Outcome(self.x, self._now.tolist() if read else self._now)


class TorchUpdates:
    """The updates in PyTorch: what Triton's are held to, and what serves where it does not run. Sums in one part."""

    def num_partials(self, vector: Tensor) -> int:
        """One."""
        return 1

    def dot(self, a: Tensor, b: Tensor, partials: Tensor, now: Tensor) -> None:
        """``<a, b>``."""
        size = min(a.numel(), b.numel())
        partials.copy_(torch.dot(a.reshape(-1)[:size], b.reshape(-1)[:size]))

    def advance(self, x: Tensor, r: Tensor, p: Tensor, q: Tensor, bends: Tensor, squares: Tensor, now: Tensor) -> None:
        """Nothing happens unless the solve is running and the curvature positive."""
        bend, row = bends.sum(), now.unbind()
        moves = (row[STATUS] == RUNNING) & (bend <= 0).logical_not()
        length = torch.where(moves, row[SLOPE] / bend, 0).to(x.dtype)
        x.addcmul_(p, length)
        r.addcmul_(q, length, value=-1)
        self.dot(r, r, squares, now)

    def turn(
        self, p: Tensor, z: Tensor, bends: Tensor, squares: Tensor, slopes: Tensor, now: Tensor, following: Tensor
    ) -> None:
        """``p`` is of no more use once the solve has stopped."""
        bend, squared, slope = bends.sum(), squares.sum(), slopes.sum()
        row = now.unbind()
        running = row[STATUS] == RUNNING
        moved = running & (bend <= 0).logical_not()
        status = torch.where(slope > 0, RUNNING, FLAT)
        status = torch.where(squared <= row[TARGET], CONVERGED, status)
        status = torch.where(squared < torch.inf, status, NOT_FINITE)
        status = torch.where(bend == 0, FLAT, status)
        status = torch.where(bend < 0, NEGATIVE, status)
        ratio = torch.where(running, slope / row[SLOPE], 0).to(p.dtype)
        after = following.unbind()
        after[SLOPE].copy_(slope)
        after[SQUARED].copy_(torch.where(moved, squared, row[SQUARED]))
        after[TARGET].copy_(row[TARGET])
        after[COUNT].copy_(row[COUNT] + running)
        after[STATUS].copy_(torch.where(running, status, row[STATUS]))
        p.mul_(ratio).add_(z)


def in_one_launch(outputs: int, features: Tensor, impl: str | None) -> bool:
    """Whether a system of these rows, made float32, is one for :data:`OPERATOR`: on CUDA, of at most 32 outputs.

    Then an iteration takes two waits of the GPU's blocks for each other in place of five launches, and those after
    convergence, which a CUDA graph would hold as well, do not run. Not for solutions so large that each block's copy of
    a direction is more work than its rows.
    """
    name, unknowns = dispatch.named(impl), outputs * (features.shape[1] + 1)
    fits = 0 < outputs <= dispatch.NARROW_OUTPUTS and 0 < unknowns <= MOST_IN_ONE_LAUNCH
    plain = type(features) is Tensor and features.dtype != torch.float64 and not dispatch.forward_mode()
    if not (fits and plain and (name == "cuda" or (name is None and features.is_cuda))):
        return False
    device = "cpu" if _extension.EMULATED else "cuda"
    return features.device.type == device and "cuda" in OPERATOR.implementations(device)


def updates_for(vector: Tensor, impl: str | None) -> Updates | None:
    """None on the CPU; else Triton's where its kernels run on this tensor and ``impl`` does not name the reference.

    ``impl="triton"`` takes Triton's interpreter on a CPU that has it.
    """
    named = dispatch.named(impl)
    if vector.is_cpu and (named != "triton" or not _extension.INTERPRETED):
        return None
    fits = vector.is_cpu if _extension.INTERPRETED else vector.is_cuda
    if _extension.TRITON_REASON is not None or not fits or named == "reference" or type(vector) is not Tensor:
        return TorchUpdates()
    from fastmeta.triton_kernels import conjugate_gradient

    return conjugate_gradient
