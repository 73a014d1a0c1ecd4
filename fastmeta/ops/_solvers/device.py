"""The iterative solvers for tensors on a GPU: the host launches and, once in a while, looks whether to go on.

One pass of conjugate gradients in place of the host's passes until the true residual is small: that decision would
wait for the device. While a CUDA graph is captured nothing is read at all: ``max_iter`` iterations are launched, and
what the state keeps is used and updated in place, so that a replay does what a call does.
"""

import math

import torch
from torch import Tensor

from fastmeta import _conjugate_gradient_scalars as scalars
from fastmeta.ops._solvers.device_conjugate_gradient import Outcome, conjugate_gradient, status_of
from fastmeta.ops._solvers.driver import MARGIN, Answer, Krylov, Solve, reachable
from fastmeta.ops._solvers.updates import updates_for


def serves(tensor: Tensor) -> bool:
    """Whether a system with this tensor is solved without waiting for the device."""
    return tensor.is_cuda


def capturing(tensor: Tensor) -> bool:
    """Whether work on this tensor is being captured in a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def refuse_capture(tensor: Tensor, solver: str, damping: float, *, grouped: bool) -> None:
    """Raise for what a CUDA graph cannot hold."""
    if not capturing(tensor):
        return
    if grouped:
        raise RuntimeError(
            "process_group cannot be captured in a CUDA graph, its processes agree on the host; solve outside the graph"
        )
    if solver == "cholesky":
        raise RuntimeError("solver='cholesky' cannot be captured in a CUDA graph; use solver='cg'")
    if damping == 0:
        raise RuntimeError("damping=0 cannot be captured in a CUDA graph, it needs a factorization; use damping > 0")


class DeviceSolve(Solve):
    """One call on a GPU; see :class:`fastmeta.ops._solvers.driver.Solve`."""

    def run(self, solver: str) -> Answer:
        """Solve by ``auto``, ``cg`` or ``pcg``."""
        state, signs, fixed = self.state, self.system.signs, capturing(self.rhs)
        if state.age >= state.refresh_every and not fixed:
            state.drop_factors()
        had_factors = state.output is not None
        if solver == "auto":
            solver = self._choose()
        scale = norm(self.rhs)
        x, residual = self._start()
        method = self._krylov(solver, fixed)
        outcome = method.solve(residual, MARGIN * self.tol * scale, self.max_iter, fixed)
        x = x + outcome.solution
        left = norm(self.rhs - self.system(x))
        relative = torch.where(scale == 0, left, left / scale)
        if outcome.read is None:
            self._keep_in_place(x)
            count = outcome.row[scalars.COUNT].to(torch.int64)
            indefinite = None if signs is None else (status_of(outcome.row) == scalars.NEGATIVE) & (signs < 0).any()
            return Answer(x, count, relative, solver, indefinite=indefinite)
        status, iterations = outcome.read[scalars.STATUS], int(outcome.read[scalars.COUNT])
        if status == scalars.NEGATIVE and self._has_negative_weights():
            raise indefinite_error(iterations)
        stopped_at = None
        if status == scalars.NOT_FINITE:
            stopped_at = math.nan
        elif self.system.damping == 0:
            stopped_at = relative.item()  # what no solution meets is outside the recurrence
        elif status != scalars.CONVERGED:
            squared, target = outcome.read[scalars.SQUARED], outcome.read[scalars.TARGET]
            stopped_at = MARGIN * self.tol * math.sqrt(squared / target) if target > 0 else math.inf
        if status != scalars.NOT_FINITE:
            self._keep(solver, x, iterations, had_factors)
        return Answer(x, iterations, relative, solver, stopped_at=stopped_at)

    def _choose(self) -> str:
        """``pcg`` where its factors are at hand or will be used again, or where nothing else solves; else ``cg``.

        On a GPU a fresh eigendecomposition waits for the host and lasts as long as many products with the Hessian.
        """
        if capturing(self.rhs):
            return "cg" if self._kept() is None else "pcg"
        reused = self.state.refresh_every > 1 and self.size.n >= self.size.k
        return "pcg" if reused or self.system.damping == 0 else "cg"

    def _krylov(self, solver: str, fixed: bool) -> "DeviceKrylov":
        if solver == "pcg":
            if fixed and self._kept() is None:
                raise RuntimeError(
                    "solver='pcg' cannot compute its eigenbases while a CUDA graph is captured; pass state= with those "
                    "of an earlier solve (of at least as many examples as features), or use solver='cg'"
                )
            return DeviceKrylov(self.system, *self._factors())
        return DeviceKrylov(self.system, self._plain(in_span=False))

    def _kept(self) -> Tensor | None:
        """The eigenbasis of an earlier solve, if it and the output factor fit this one."""
        basis, output = self.state.basis, self.state.output
        if basis is None or output is None or self.size.n < self.size.k:
            return None
        fits = basis.shape[0] == self.size.k and output.b.shape[0] == self.size.c and basis.dtype == self.rhs.dtype
        return basis if fits and basis.device == self.rhs.device else None

    def _start(self) -> tuple[Tensor, Tensor]:
        last = self.state.solution
        zero = torch.zeros_like(self.rhs)
        if last is None or last.shape != self.rhs.shape or last.device != self.rhs.device:
            return zero, self.rhs
        last = last.to(self.rhs.dtype)
        image = self.system(last)
        bend = (last * image).sum()
        length = (last * self.rhs).sum() / bend
        residual = self.rhs - length * image
        better = (bend > 0) & (norm(residual) < norm(self.rhs))
        if self.system.joined is not None:
            better = self.system.joined.first(better.to(torch.int32)) > 0
        return torch.where(better, length * last, zero), torch.where(better, residual, self.rhs)

    def _has_negative_weights(self) -> bool:
        signs, joined = self.system.signs, self.system.joined
        if joined is not None:
            return joined.negative
        return signs is not None and bool((signs < 0).any())

    def _keep_in_place(self, x: Tensor) -> None:
        last, output = self.state.solution, self.state.output
        factors = () if output is None else (self.state.basis, output.b, output.vectors)
        self.state.in_graphs.append((last, *factors))
        if last is not None and last.shape == x.shape and last.device == x.device:
            last.copy_(x)


class DeviceKrylov(Krylov):
    """Conjugate gradients in some coordinates; with an output factor, preconditioned."""

    def solve(self, rhs: Tensor, target: Tensor, budget: int, fixed: bool) -> Outcome:
        """The correction for a residual ``rhs``, at most ``budget`` iterations."""
        inside = self._coordinates.inside(rhs)
        if self._system.damping == 0:
            inside = reachable(self._system, inside)
        outcome = conjugate_gradient(
            self._system,
            inside,
            target=target,
            max_iter=budget,
            updates=updates_for(inside, self._system.impl),
            precondition=self._precondition,
            fixed=fixed,
            shared=None if self._system.joined is None else self._system,
        )
        lifted = self._coordinates.lift(outcome.solution, rhs, inside, self._system.damping)
        return outcome._replace(solution=lifted)


def indefinite_error(iterations: int) -> torch.linalg.LinAlgError:
    """What the host says of negative curvature."""
    return torch.linalg.LinAlgError(
        "the damped Hessian is not positive definite (negative curvature along a direction of iteration "
        f"{iterations}): some weights are negative; raise damping"
    )


def norm(tensor: Tensor) -> Tensor:
    """Frobenius norm, accumulated in float64 and left on the device."""
    return torch.linalg.vector_norm(tensor, dtype=torch.float64)
