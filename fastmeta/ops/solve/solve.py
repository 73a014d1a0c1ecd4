"""Chooses a solver, runs it, and checks its answer with the true residual."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastmeta import losses
from fastmeta.losses import LOSSES
from fastmeta.ops.solve import conjugate_gradient as cg
from fastmeta.ops.solve import few_rows
from fastmeta.ops.solve import system as systems
from fastmeta.ops.solve.cholesky import CholeskySolver, block_shape
from fastmeta.ops.solve.kronecker import (
    KroneckerPreconditioner,
    OutputFactor,
    Rows,
    SolverState,
    eigenbasis,
    output_factor,
    trial_iterations,
)
from fastmeta.ops.solve.system import Coordinates, DampedHessian

# Unknowns up to which auto factors the dense Hessian: there it takes no longer than the preconditioner's eigenbases.
MOST_DENSE = 160
# Without damping, a pass that leaves a residual this many times as large has followed directions of no curvature.
GROWTH = 10.0


class Answer(NamedTuple):
    """``x [C, K]`` and how it was reached; of a captured solve numbers and flags are tensors that nobody has read."""

    solution: Tensor
    iterations: int | Tensor
    residual: float | Tensor
    solver: str
    indefinite: Tensor | None = None
    """whether negative curvature stopped a captured solve"""


class Step(NamedTuple):
    """One pass of a solver: a correction to the solution, and the last row of numbers of conjugate gradients."""

    correction: Tensor
    row: Tensor | list[float]


DIRECT = [0.0, 0.0, 0.0, 1.0, float(cg.CONVERGED)]


class Solve:
    """One call: the system, its right-hand side, and what an earlier call left.

    On the CPU and on a GPU the passes of a solver go on until the true residual is small. A captured solve is one pass:
    nothing is read, and what the state keeps is used and updated in place, so that a replay does what a call does.

    Args:
        system: the damped Hessian.
        rhs: ``[C, K]``.
        rows: the caller's tensors behind ``system.features``; they identify a kept basis of their span.
        tol: relative residual to reach.
        max_iter: most iterations.
        state: carrier of warm starts; None starts afresh.
    """

    def __init__(
        self, system: DampedHessian, rhs: Tensor, rows: Rows, tol: float, max_iter: int, state: SolverState | None
    ) -> None:
        self.system = system
        self.rhs = rhs
        self.rows = rows
        self.tol = tol
        self.max_iter = max_iter
        self.state = SolverState(refresh_every=1) if state is None else state
        self.look = cg.look_every(rhs)
        c, k = system.num_unknowns
        self.n, self.c, self.k = system.num_rows, c, k

    def run(self, solver: str) -> Answer:
        """Solve by ``auto``, ``cholesky``, ``cg`` or ``pcg``."""
        if self.look == 0:
            return self._captured(self._choose() if solver == "auto" else solver)
        state, joined = self.state, self.system.joined
        if not state.is_preconditioned:
            state.drop_factors()
        had_factors = state.output is not None
        scale = norm(self.rhs).item()
        if scale == 0:
            return Answer(torch.zeros_like(self.rhs), 0, 0.0, solver)
        is_auto = solver == "auto"
        solver = self._choose() if is_auto else solver
        # What auto begins with has so many iterations; then comes pcg.
        is_trial = is_auto and solver == "cg" and not cg.serves(self.rhs)
        most = self._trial() if is_trial else self.max_iter
        x, residual = self._start(solver)
        size, iterations, before, stagnates = norm(residual).item(), 0, 0, False
        if joined is not None:
            scale, size = joined.agreed(scale, size)
        method = None
        while size > self.tol * scale and iterations < self.max_iter:
            if is_trial and (stagnates or iterations >= most):
                solver, most, before, method, is_trial = "pcg", self.max_iter, iterations, None, False
            method = method or self._method(solver)
            step = method(residual, cg.MARGIN * self.tol * scale, most - iterations)
            x = x + step.correction
            residual = self.rhs - self.system(x)
            made, status = float(step.row[cg.COUNT]), float(step.row[cg.STATUS])
            previous, size = size, norm(residual).item()
            if joined is not None:
                size, made, status = joined.agreed(size, made, status)
            iterations += int(made)
            if status == cg.NEGATIVE and self._has_negative_weights():
                raise indefinite_error(iterations)
            if self.system.damping == 0 and size > GROWTH * previous:
                raise singular_error(solver, size / scale)
            stagnates = not size <= cg.STAGNATION * previous
            if stagnates and not is_trial:
                break
        if math.isfinite(size):
            self._keep(solver, x, iterations, iterations - before, had_factors)
        return Answer(x, iterations, size / scale, solver)

    def _captured(self, solver: str) -> Answer:
        x, residual = self._start(solver)
        scale = norm(self.rhs)
        method = self._method(solver)
        most = self.max_iter if isinstance(method, InOneLaunch) else self.state.most_in_graph(self.max_iter)
        step = method(residual, cg.MARGIN * self.tol * scale, most)
        x = x + step.correction
        left = norm(self.rhs - self.system(x))
        signs, state = self.system.signs, self.state
        negative = step.row[cg.STATUS] == cg.NEGATIVE
        indefinite = None if signs is None else negative & (signs < 0).any()
        factors = () if state.output is None else (state.basis, state.output.b, state.output.vectors)
        state.in_graphs.append((state.solution, *factors))
        if state.solution is not None and state.solution.shape == x.shape and state.solution.device == x.device:
            state.solution.copy_(x)
        assert isinstance(step.row, Tensor)
        count = step.row[cg.COUNT].to(torch.int64)
        return Answer(x, count, torch.where(scale == 0, left, left / scale), solver, indefinite)

    def _start(self, solver: str) -> tuple[Tensor, Tensor]:
        """The last solution at the length that is best for this system, and its residual."""
        last, zero = self.state.solution, torch.zeros_like(self.rhs)
        if solver == "cholesky" or last is None or last.shape != self.rhs.shape or last.device != self.rhs.device:
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

    def _choose(self) -> str:
        if self.look == 0:
            return "cg" if self._kept_basis() is None else "pcg"
        if self.system.damping == 0:
            return "pcg"  # meets a singular system with a least-norm rule
        blocks, size = block_shape(self.system.loss, self.c, min(self.n, self.k))
        if size <= MOST_DENSE and blocks * size <= 4 * MOST_DENSE and not cg.serves(self.rhs):
            return "cholesky"
        return "pcg" if self.state.is_preconditioned else "cg"

    def _trial(self) -> int:
        in_row_space, solves = self._in_row_space(), self.state.refresh_every
        most = trial_iterations(self.n, self.c, self.k, in_row_space=in_row_space, solves=solves)
        return min(most, self.max_iter // 2)

    def _in_row_space(self) -> bool:
        few = few_rows.pays(self.n, self.c, self.k)
        return few and self.system.damping > 0 and self.system.joined is None

    def _method(self, solver: str) -> "Cholesky | Krylov | FewRows | InOneLaunch":
        if solver == "cholesky":
            return Cholesky(self.system)
        if solver == "pcg":
            if self.look == 0 and self._kept_basis() is None:
                raise RuntimeError(
                    "solver='pcg' cannot compute its eigenbases while a CUDA graph is captured; pass state= with those "
                    "of an earlier solve (of at least as many examples as features), or use solver='cg'"
                )
            return Krylov(self.system, *self._factors())
        system = self.system
        apart = system.joined is None and system.damping > 0
        if apart and cg.in_one_launch(self.c, system.features, system.impl):
            return InOneLaunch(system)
        if self._in_row_space():
            return FewRows(system)
        return Krylov(system, self._plain())

    def _plain(self) -> Coordinates:
        """Coordinates of plain CG.

        Without damping those of the eigenbasis: what no row reaches is a coordinate there, for ``reachable`` to leave
        out. Inside, rounding would grow along it without bound.
        """
        inside = systems.identity(self.system.features)
        if self.system.damping > 0:
            return inside
        if self.n < self.k:
            inside = systems.span(self.system.features, self.system.joined)
        return eigenbasis(inside, self.system.joined)

    def _factors(self) -> tuple[Coordinates, OutputFactor]:
        """Eigenbases of the second moment of the rows and of the mean output curvature, kept or new."""
        state, system = self.state, self.system
        features = system.features
        if self.n < self.k:
            # Several processes keep none: that one's rows are those of before tells nothing of another's.
            inside = None if system.joined is not None else state.span_of(self.rows, self.k)
            if inside is None:
                inside = eigenbasis(systems.span(features, system.joined), system.joined)
                if system.joined is None:
                    state.keep_span(self.rows, inside)
        elif state.basis is not None and _fits(state.basis, self.k, features):
            inside = Coordinates(features @ state.basis.T, state.basis, True)
        else:
            inside = eigenbasis(systems.identity(features), system.joined)
            state.basis = inside.basis
        kept = state.output
        if kept is None or not _fits(kept.b, self.c, features) or (kept.softmax and system.damping == 0):
            # A rotation of the outputs would cost a third of a product with H, or more.
            softmax = system.damping > 0 and 3 * self.c > self.n
            curvature = losses.of(system.loss).output_curvature(system.logits, system.targets)
            kept = state.output = output_factor(curvature, self._weights(), softmax=softmax, joined=system.joined)
        return inside, kept

    def _kept_basis(self) -> Tensor | None:
        """The eigenbasis of an earlier solve, if it and the output factor fit this one."""
        basis, output = self.state.basis, self.state.output
        if basis is None or output is None or self.n < self.k:
            return None
        return basis if _fits(basis, self.k, self.rhs) and _fits(output.b, self.c, self.rhs) else None

    def _weights(self) -> Tensor:
        features, *weights = self.rows
        return weights[0].abs().to(self.rhs.dtype) if weights else self.rhs.new_ones(features.shape[0])

    def _has_negative_weights(self) -> bool:
        signs, joined = self.system.signs, self.system.joined
        if joined is not None:
            return joined.negative
        return signs is not None and bool((signs < 0).any())

    def _keep(self, solver: str, x: Tensor, iterations: int, with_factors: int, had_factors: bool) -> None:
        state = self.state
        state.solver, state.solution, state.iterations = solver, x, iterations
        if state.output is None:
            return
        state.age += 1
        if not had_factors:
            state.iterations_when_new = with_factors
        elif with_factors > 2 * max(state.iterations_when_new, 1):
            state.drop_factors()


class Cholesky:
    """Direct solve; a second pass is a step of iterative refinement."""

    def __init__(self, system: DampedHessian) -> None:
        features = system.features
        tall = system.num_rows >= features.shape[1]
        self._damping = system.damping
        self._coordinates = systems.identity(features) if tall else systems.span(features, system.joined)
        self._factor = CholeskySolver(system.with_features(self._coordinates.features))

    def __call__(self, rhs: Tensor, target: float | Tensor, budget: int) -> Step:
        """The correction for a residual ``rhs``."""
        inside = self._coordinates.inside(rhs)
        return Step(self._coordinates.lift(self._factor.solve(inside), rhs, inside, self._damping), DIRECT)


class Krylov:
    """Conjugate gradients in some coordinates; with an output factor, preconditioned.

    Args:
        system: the damped Hessian.
        inside: coordinates; the eigenbasis of the rows' second moment if ``output`` is given.
        output: output factor of the preconditioner.
    """

    def __init__(self, system: DampedHessian, inside: Coordinates, output: OutputFactor | None = None) -> None:
        self._coordinates = inside
        self._system = system if inside.basis is None else system.with_features(inside.features)
        self._precondition: KroneckerPreconditioner | None = None
        if output is not None:
            self._precondition = KroneckerPreconditioner(inside.features, output, system.damping, system.joined)

    def __call__(self, rhs: Tensor, target: float | Tensor, budget: int) -> Step:
        """The correction for a residual ``rhs``."""
        inside = self._coordinates.inside(rhs)
        if self._system.damping == 0:
            inside = reachable(self._system, inside)
        outcome = cg.conjugate_gradient(
            self._system,
            inside,
            target=target,
            max_iter=budget,
            updates=cg.updates_for(inside, self._system.impl),
            precondition=self._precondition,
            look=cg.look_every(inside),
            shared=None if self._system.joined is None else self._system,
        )
        return Step(self._coordinates.lift(outcome.solution, rhs, inside, self._system.damping), outcome.row)


class FewRows:
    """Conjugate gradients in the logit tangents of the rows; see :class:`fastmeta.ops.solve.few_rows.RowSpace`."""

    def __init__(self, system: DampedHessian) -> None:
        self._features, self._impl, self._damping = system.features, system.impl, system.damping
        self._space = few_rows.RowSpace(
            system.features, system.logits, system.signs, system.loss, system.damping, system.targets
        )

    def __call__(self, rhs: Tensor, target: float | Tensor, budget: int) -> Step:
        """The correction for a residual ``rhs``."""
        scaled = rhs / self._damping
        residual = self._space.curved(self._features @ scaled.T).neg_()
        outcome = self._space.solve(residual, target, budget, self._impl)
        return Step(torch.addmm(scaled, outcome.solution[1].T, self._features), outcome.row)


class InOneLaunch:
    """Conjugate gradients by :data:`fastmeta.ops.solve.conjugate_gradient.OPERATOR`."""

    def __init__(self, system: DampedHessian) -> None:
        self._system = system
        tensors = (system.features, system.logits, system.targets, system.signs)
        self._tensors = [tensor if tensor is None else tensor.contiguous() for tensor in tensors]

    def __call__(self, rhs: Tensor, target: float | Tensor, budget: int) -> Step:
        """The correction for a residual ``rhs``."""
        system, rhs = self._system, rhs.contiguous()
        if isinstance(target, float):
            target = torch.full((), target, dtype=torch.float64, device=rhs.device)
        kernel = cg.OPERATOR.select(system.impl, *self._tensors, rhs, target)
        assert kernel is not None, "it was asked for by in_one_launch"
        numbers = LOSSES[system.loss], system.damping, min(budget, 2**31 - 1)
        solution, row = kernel(*self._tensors, rhs, target, *numbers)
        return Step(solution, row.tolist() if cg.look_every(rhs) else row)


def reachable(system: DampedHessian, rhs: Tensor) -> Tensor:
    """Without what no solution meets when there is no damping. ``[C, r]``.

    The Hessian of a softmax is zero along (1, ..., 1), and every Hessian in a coordinate that no row has.
    """
    moment = system.features.square().sum(0)
    if system.joined is not None:
        (moment,) = system.joined.sum(moment)
    floor = torch.finfo(moment.dtype).eps * max(system.num_rows, len(moment)) * moment.amax()
    inside = rhs * (moment > floor)
    return inside - inside.mean(0) if losses.of(system.loss).has_softmax else inside


def refuse_capture(tensor: Tensor, solver: str, damping: float, *, grouped: bool) -> None:
    """Raise for what a CUDA graph cannot hold."""
    if not cg.capturing(tensor):
        return
    if grouped:
        raise RuntimeError(
            "process_group cannot be captured in a CUDA graph, its processes agree on the host; solve outside the graph"
        )
    if solver == "cholesky":
        raise RuntimeError("solver='cholesky' cannot be captured in a CUDA graph; use solver='cg'")
    if damping == 0:
        raise RuntimeError("damping=0 cannot be captured in a CUDA graph, it needs a factorization; use damping > 0")


def indefinite_error(iterations: int) -> torch.linalg.LinAlgError:
    """What the host says of negative curvature."""
    return torch.linalg.LinAlgError(
        "the damped Hessian is not positive definite (negative curvature along a direction of iteration "
        f"{iterations}): some weights are negative; raise damping"
    )


def singular_error(solver: str, residual: float) -> torch.linalg.LinAlgError:
    """What the host says of a solution that rounding has made."""
    return torch.linalg.LinAlgError(
        f"the Hessian is nearly singular, and without damping solver={solver!r} diverges (relative residual "
        f"{residual:.3g}): outputs that the predictions rule out, or dependent features; use damping > 0"
    )


def norm(tensor: Tensor) -> Tensor:
    """Frobenius norm, accumulated in float64 and left on the device."""
    return torch.linalg.vector_norm(tensor, dtype=torch.float64)


def _fits(kept: Tensor, size: int, like: Tensor) -> bool:
    return kept.shape[0] == size and kept.dtype == like.dtype and kept.device == like.device
