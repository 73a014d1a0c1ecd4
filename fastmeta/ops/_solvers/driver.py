"""Chooses a solver, runs it, and checks its answer with the true residual."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastmeta.ops._solvers import coordinates, cost
from fastmeta.ops._solvers.cholesky import CholeskySolver
from fastmeta.ops._solvers.conjugate_gradient import Together, conjugate_gradient
from fastmeta.ops._solvers.kronecker import KroneckerPreconditioner, OutputFactor, output_factor
from fastmeta.ops._solvers.state import Rows, SolverState
from fastmeta.ops._solvers.system import DampedHessian

# The recurrence of CG drifts from the true residual: stop it a little below the tolerance.
MARGIN = 0.95
# A pass of a solver that leaves more than this part of the true residual is at the precision of the dtype.
STAGNATION = 0.5


# The part of the rival's price that auto spends on CG before it judges the rate of convergence.
TRIAL = 0.1


class Answer(NamedTuple):
    """``x [C, K]`` and how it was reached."""

    solution: Tensor
    iterations: int | Tensor
    residual: float | Tensor
    solver: str
    indefinite: Tensor | None = None
    """whether negative curvature stopped it, where the host did not look"""
    stopped_at: float | None = None
    """relative residual at which it gave up, as far as the host knows without waiting for the true one"""


class Step(NamedTuple):
    """One pass of a solver: a correction to the solution, and whether another solver should go on."""

    correction: Tensor
    iterations: int
    gave_up: bool = False


def norm(tensor: Tensor) -> float:
    """Frobenius norm, accumulated in float64."""
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).item()


class Solve:
    """One call: the system, its right-hand side, and what an earlier call left.

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
        c, k = system.num_unknowns
        self.size = cost.Size(system.num_rows, c, k)

    def run(self, solver: str) -> Answer:
        """Solve by ``auto``, ``cholesky``, ``cg`` or ``pcg``."""
        state = self.state
        if state.age >= state.refresh_every:
            state.drop_factors()
        had_factors = state.output is not None
        scale = norm(self.rhs)
        if scale == 0:
            return Answer(torch.zeros_like(self.rhs), 0, 0.0, solver)
        automatic = solver == "auto"
        if automatic:
            solver = self._choose()
        x, residual = self._start() if solver != "cholesky" else (torch.zeros_like(self.rhs), self.rhs)
        size, iterations = norm(residual), 0
        if self.system.joined is not None:
            scale, size = self.system.joined.agreed(scale, size)
        method = None
        while size > self.tol * scale and iterations < self.max_iter:
            method = method or self._method(solver, automatic)
            step = method(residual, MARGIN * self.tol * scale, self.max_iter - iterations)
            x = x + step.correction
            iterations += step.iterations
            residual = self.rhs - self.system(x)
            previous, size, gave_up = size, norm(residual), step.gave_up
            if self.system.joined is not None:
                size, count, hand_over = self.system.joined.agreed(size, iterations, gave_up)
                iterations, gave_up = int(count), bool(hand_over)
            if gave_up:
                solver, method = "pcg", None
            elif size > STAGNATION * previous:
                break
        self._keep(solver, x, iterations, had_factors)
        return Answer(x, iterations, size / scale, solver)

    def _start(self) -> tuple[Tensor, Tensor]:
        """The last solution at the length that is best for this system, and its residual."""
        last = self.state.solution
        if last is None or last.shape != self.rhs.shape or last.device != self.rhs.device:
            return torch.zeros_like(self.rhs), self.rhs
        last = last.to(self.rhs.dtype)
        image = self.system(last)
        bend = (last * image).sum().item()
        length = (last * self.rhs).sum().item() / bend if bend > 0 else math.nan
        residual = self.rhs - length * image
        better = norm(residual) < norm(self.rhs)
        if self.system.joined is not None:
            better = self.system.joined.agreed(better) == [1.0]
        if not better:
            return torch.zeros_like(self.rhs), self.rhs
        return length * last, residual

    def _choose(self) -> str:
        if self.system.damping == 0:
            return "pcg"  # the only one that meets a singular system with a least-norm rule
        pcg = self._price_of_pcg()
        direct = cost.cholesky(self.size, self.system.loss)
        iterative = pcg.setup + cost.pcg_iterations(-math.log10(self.tol)) * pcg.iteration
        if direct < iterative:
            return "cholesky"
        return "cg" if self.state.output is None else "pcg"  # with its factors at hand there is nothing to try first

    def _price_of_pcg(self) -> cost.Price:
        state = self.state
        kept_basis = state.basis is not None if self.size.n >= self.size.k else self._kept_span() is not None
        price = cost.pcg(self.size, self.system.loss, kept_basis=kept_basis, kept_output=state.output is not None)
        fresh = price.setup / (1 if kept_basis else state.refresh_every)
        return price._replace(setup=fresh)

    def _method(self, solver: str, automatic: bool) -> "Cholesky | Krylov":
        if solver == "cholesky":
            return Cholesky(self.system)
        if solver == "pcg":
            inside, output = self._factors()
            return Krylov(self.system, inside, output)
        if automatic:
            return Krylov(self.system, coordinates.identity(self.system.features), rival=self._price_of_pcg())
        return Krylov(self.system, self._plain(in_span=cost.cg_in_span_pays(self.size)))

    def _plain(self, *, in_span: bool) -> coordinates.Coordinates:
        """Coordinates of plain CG.

        Without damping those of the eigenbasis: what no row reaches is a coordinate there, for ``reachable`` to leave
        out. Inside, rounding would grow along it without bound.
        """
        singular, joined = self.system.damping == 0, self.system.joined
        inside = coordinates.identity(self.system.features)
        if self.size.n < self.size.k and (in_span or singular):
            inside = coordinates.span(self.system.features, joined)
        return coordinates.eigenbasis(inside, joined) if singular else inside

    def _factors(self) -> tuple[coordinates.Coordinates, OutputFactor]:
        """Eigenbases of the second moment of the rows and of the mean output curvature, kept or new."""
        state, system = self.state, self.system
        features = system.features
        if self.size.n < self.size.k:
            inside = self._kept_span()
            if inside is None:
                inside = coordinates.eigenbasis(coordinates.span(features, system.joined), system.joined)
                if system.joined is None:
                    state.keep_span(self.rows, inside)
        elif state.basis is not None and state.basis.shape[0] == self.size.k and state.basis.dtype == features.dtype:
            inside = coordinates.Coordinates(features @ state.basis.T, state.basis, True)
        else:
            inside = coordinates.eigenbasis(coordinates.identity(features), system.joined)
            state.basis = inside.basis
        kept = state.output
        fits = kept is not None and kept.b.shape[0] == self.size.c and kept.b.dtype == features.dtype
        if kept is None or not fits or (kept.softmax and system.damping == 0):
            softmax = system.damping > 0 and cost.softmax_factor_pays(self.size)
            kept = state.output = output_factor(
                system.logits, self._weights(), system.loss, softmax=softmax, joined=system.joined
            )
        return inside, kept

    def _kept_span(self) -> coordinates.Coordinates | None:
        # Several processes have none: that one's rows are those of before tells nothing of another's.
        return None if self.system.joined is not None else self.state.span_of(self.rows, self.size.k)

    def _weights(self) -> Tensor:
        features, *weights = self.rows
        return weights[0].abs().to(self.rhs.dtype) if weights else self.rhs.new_ones(features.shape[0])

    def _keep(self, solver: str, x: Tensor, iterations: int, had_factors: bool) -> None:
        state = self.state
        state.solver, state.solution = solver, x
        if state.output is None:
            return
        state.age += 1
        if not had_factors:
            state.iterations_when_new = iterations
        elif iterations > 2 * max(state.iterations_when_new, 1):
            state.drop_factors()


def reachable(system: DampedHessian, rhs: Tensor) -> Tensor:
    """Without what no solution meets when there is no damping. ``[C, r]``.

    The Hessian of a softmax is zero along (1, ..., 1), and every Hessian in a coordinate that no row has.
    """
    moment = system.features.square().sum(0)
    if system.joined is not None:
        (moment,) = system.joined.sum(moment)
    floor = torch.finfo(moment.dtype).eps * max(system.num_rows, len(moment)) * moment.amax()
    inside = rhs * (moment > floor)
    return inside - inside.mean(0) if system.loss in ("cross_entropy", "mse_probs") else inside


class Cholesky:
    """Direct solve; a second pass is a step of iterative refinement."""

    def __init__(self, system: DampedHessian) -> None:
        features = system.features
        tall = system.num_rows >= features.shape[1]
        self._damping = system.damping
        self._coordinates = coordinates.identity(features) if tall else coordinates.span(features, system.joined)
        self._factor = CholeskySolver(system.with_features(self._coordinates.features))

    def __call__(self, rhs: Tensor, target: float, budget: int) -> Step:
        inside = self._coordinates.inside(rhs)
        solution = self._factor.solve(inside)
        return Step(self._coordinates.lift(solution, rhs, inside, self._damping), 1)


class Krylov:
    """Conjugate gradients in some coordinates; with an output factor, preconditioned; with a rival, ready to give up.

    Args:
        system: the damped Hessian.
        inside: coordinates; the eigenbasis of the rows' second moment if ``output`` is given.
        output: output factor of the preconditioner.
        rival: price of the preconditioned solver that would go on.
    """

    def __init__(
        self,
        system: DampedHessian,
        inside: coordinates.Coordinates,
        output: OutputFactor | None = None,
        rival: cost.Price | None = None,
    ) -> None:
        self._coordinates = inside
        self._system = system if inside.basis is None else system.with_features(inside.features)
        self._precondition: Callable[[Tensor], Tensor] | None = None
        if output is not None:
            self._precondition = KroneckerPreconditioner(inside.features, output, system.damping, system.joined)
        self._rival = rival
        c, k = system.num_unknowns
        self._iteration = cost.cg(cost.Size(system.num_rows, c, k)).iteration

    def __call__(self, rhs: Tensor, target: float, budget: int) -> Step:
        inside = self._coordinates.inside(rhs)
        if self._system.damping == 0:
            inside = reachable(self._system, inside)
        together = None if self._system.joined is None else Together(self._system)
        solution, _, iterations, gave_up = conjugate_gradient(
            together or self._system,
            inside,
            target=target,
            max_iter=budget,
            precondition=self._precondition,
            give_up=None if self._rival is None else lambda norms: self._rival_is_cheaper(norms, target),
            indefinite=self._system.may_be_indefinite,
        )
        if together is not None:
            together.leave()
        correction = self._coordinates.lift(solution, rhs, inside, self._system.damping)
        return Step(correction, iterations, gave_up)

    def _rival_is_cheaper(self, norms: list[float], target: float) -> bool:
        """Whether going on at the rate of the last iterations costs more than starting the preconditioned solver."""
        assert self._rival is not None
        spent = (len(norms) - 1) * self._iteration
        start_over = self._rival.setup + cost.pcg_iterations(math.log10(norms[0] / target)) * self._rival.iteration
        if spent < TRIAL * start_over:
            return False
        decades = math.log10(norms[-1] / target)
        back = min(len(norms) - 1, 4)
        rate = math.log10(norms[-1 - back] / norms[-1]) / back
        go_on = decades / rate * self._iteration if rate > 0 else math.inf
        return go_on > self._rival.setup + cost.pcg_iterations(decades) * self._rival.iteration
