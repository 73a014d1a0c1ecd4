"""A direction times the inverse Hessian of the inner problem."""

import math
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from fastmeta import checks, losses, ops
from fastmeta.directions import linear_solvers
from fastmeta.directions.holdout_gradient import HoldoutGradient
from fastmeta.directions.rule import DirectionRule
from fastmeta.ops import HessianSolution, NotConvergedWarning, SolverState
from fastmeta.ops.solve import conjugate_gradient as cg
from fastmeta.ops.solve import few_rows
from fastmeta.ops.solve.kronecker import OutputFactor, trial_iterations
from fastmeta.ops.solve.system import NotFiniteError
from fastmeta.problem import (
    AnyDirection,
    Curvature,
    Dense,
    Direction,
    Factors,
    InnerLoss,
    LastLayerProblem,
    Problem,
    Reduction,
    of_last_layer,
    single,
    vectors,
)
from fastmeta.state import Number, Stateful, entry

Solver = Literal["auto", "cholesky", "cg", "pcg", "neumann"]
SOLVERS: tuple[Solver, ...] = ("auto", "cholesky", "cg", "pcg", "neumann")
REFRESH_EVERY = 10  # solves that share the eigenbases of a preconditioner


class _Last:
    """What the last call left: in slots, as no part of a method's state that fastmeta.graph looks at.

    The factors of a preconditioner serve the batches of the next steps. The solution does not: over batches drawn anew
    a solve that starts from it took as many iterations as one from 0.
    """

    __slots__ = ("solution", "state")

    def __init__(self) -> None:
        self.solution: HessianSolution | linear_solvers.Solved | None = None
        self.state = SolverState()

    def state_for(self, tensor: Tensor) -> SolverState:
        """What the next solve may use. On a GPU no factors: a CUDA graph would use the same ones for ever."""
        self.state.refresh_every = 1 if tensor.is_cuda else REFRESH_EVERY
        return self.state


class InverseHessian(Stateful):
    r"""``(H + damping I)^{-1} v`` of another direction, with H the Hessian of the inner problem.

    Not All Unlabeled Data Are Equal, Eq. (6): H of ``C^T + C^U``, both means (or sums) of one loss. The choices of its
    Fig. 3:

    ==================================  ==============================================================================
    Ren et al. (2020)                   the last layer, by ``cholesky``
    Lorraine et al. (2020)              ``neumann`` on the whole model or the ``layers`` that memory allows
    Luketina et al. (2016)              H = I: leave this rule out. Its result is this one's times ``1 + damping`` where
                                        H is I and times ``damping`` where H is 0; Adam is blind to the factor
    ==================================  ==============================================================================

    At the last layer the system is solved by :func:`fastmeta.ops.solve_hessian`; with few examples (``cg`` or
    ``auto``) and the gradient of the hold-out loss it is solved in the logit tangents of the examples, of which the
    direction is then made (:class:`fastmeta.problem.Factors`). For the whole model H is known by its products
    alone; ``auto`` is ``cg``. Away from a minimum the Hessian of a model has negative eigenvalues, and neither
    iteration solves that system. ``curvature="gauss_newton"`` takes ``J^T C J`` in its place, with ``J = df/dtheta``,
    and C the curvature of the loss by the logits (itself Gauss-Newton for ``mse_probs`` and ``mse_tanh``): it has no
    negative eigenvalue as long as no weight is negative, and equals H where the predictions fit.

    Args:
        of: the rule that gives v.
        damping: >= 0; weight decay enters here. More than 0 wherever there are more parameters than ``N C``.
        solver: ``auto``; ``cholesky`` (exact) and ``pcg``, for the last layer alone; ``cg``; ``neumann``:
            ``step sum_{j<=J} (I - step (H + damping I))^j v``.
        tol: relative residual at which the iterative solvers stop.
        max_iter: and their limit; J.
        loss: the inner loss on the unlabeled examples, which is the labeled one too.
        step: of ``neumann``; it converges below ``2 / (largest eigenvalue of H + damping)``. None: one over that
            eigenvalue, found by 10 more products.
        layers: names of the modules or parameters that move, and that H is taken by; the others are left out of the
            direction. None: all. For the whole model alone.
        curvature: ``gauss_newton`` or ``hessian``. At the last layer they differ for ``mse_probs`` and ``mse_tanh``.
        reduction: of the inner losses over their examples, ``mean`` or ``sum``.

    Raises:
        ValueError: an option is not one of those named or not for this level, or a number is out of its range.
        NotImplementedError: when called, a part of the model has no forward mode, which ``gauss_newton`` needs.
        torch.linalg.LinAlgError: when called, negative curvature or a series that diverges; the message says the cure.

    Warns:
        NotConvergedWarning: the residual of ``cg`` stayed above ``tol``.

    Half a step of Newton, as H is that of two losses and v that of one:

    >>> from fastmeta.problem import LastLayerProblem, Rows
    >>> rows = Rows(torch.ones(1, 1), torch.zeros(1, 1))
    >>> problem = LastLayerProblem(rows, torch.ones(1, 1), rows, torch.ones(1, 1), has_bias=False)
    >>> rule = InverseHessian(HoldoutGradient("mse"), loss="mse", damping=0.0, solver="cholesky")
    >>> rule(problem).weight.item(), rule.last_solution.iterations
    (-0.5, 1)
    """

    damping = Number()

    def __init__(
        self,
        of: DirectionRule | None = None,
        damping: float = 0.1,
        solver: Solver = "auto",
        tol: float = 1e-4,
        max_iter: int = 100,
        loss: str = "cross_entropy",
        step: float | None = None,
        layers: tuple[str, ...] | None = None,
        curvature: Curvature = "gauss_newton",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        checks.loss_code(loss)
        checks.choice(reduction, "reduction", "mean", "sum")
        if solver not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
        if curvature not in ("gauss_newton", "hessian"):
            raise ValueError(f"curvature must be gauss_newton or hessian, got {curvature!r}")
        if checks.number(tol, "tol") <= 0:
            raise ValueError(f"tol must be > 0, got {tol}")
        if max_iter < 1:
            raise ValueError(f"max_iter must be >= 1, got {max_iter}")
        if step is not None and (checks.number(step, "step") <= 0 or solver != "neumann"):
            raise ValueError(f"step must be > 0 and for solver='neumann', got {step} for {solver!r}")
        if isinstance(layers, str):
            raise TypeError(f"layers must be a tuple of names, got the string {layers!r}")
        self.of: DirectionRule = HoldoutGradient() if of is None else of
        self.damping = damping
        self.solver: Solver = solver
        self.tol = tol
        self.max_iter = max_iter
        self.loss = loss
        self.step = step
        self.layers = layers
        self.curvature: Curvature = curvature
        self.reduction: Reduction = reduction
        self._last = _Last()

    @property
    def last_solution(self) -> HessianSolution | linear_solvers.Solved | None:
        """``iterations`` and ``residual`` of the last call; reading them may wait for a GPU."""
        return self._last.solution

    def entries(self) -> dict[str, Tensor]:
        """The factors of a preconditioner, which serve later solves."""
        state = self._last.state
        output = (None, None, False) if state.output is None else state.output
        factors = {"basis": state.basis, "output": output[0], "output_vectors": output[1]}
        kept = {name: tensor for name, tensor in factors.items() if tensor is not None}
        # safetensors wants them contiguous; the order of a matrix in memory decides how a product with it is rounded.
        by_column = {name for name, tensor in kept.items() if not tensor.is_contiguous()}
        forms = [(name in kept) + (name in by_column) for name in factors]
        numbers = torch.tensor([state.age, state.iterations, state.iterations_when_new, output[2], *forms])
        copies = {name: (kept[name].mT if name in by_column else kept[name]).contiguous().clone() for name in kept}
        return {f"solver.{name}": tensor for name, tensor in {"numbers": numbers, **copies}.items()}

    def check_entries(self, state: Mapping[str, Any]) -> list[str]:
        """See :meth:`fastmeta.state.Stateful.check_entries`."""
        there = entry(state, "solver.numbers", (7,), type(self).__name__)[4:].tolist()
        names = ("solver.basis", "solver.output", "solver.output_vectors")
        kept = [name for name, is_there in zip(names, there, strict=True) if is_there]
        for name in kept:
            entry(state, name, None, type(self).__name__)
        return ["solver.numbers", *kept]

    def load_entries(self, entries: Mapping[str, Tensor]) -> None:
        """See :meth:`fastmeta.state.Stateful.load_entries`."""
        state, kept = self._last.state, {name[7:]: tensor.detach().clone() for name, tensor in entries.items()}
        state.reset()
        numbers: list[int] = kept.pop("numbers").tolist()
        state.age, state.iterations, state.iterations_when_new, softmax, *forms = numbers
        for name, form in zip(("basis", "output", "output_vectors"), forms, strict=True):
            if form == 2:
                kept[name] = kept[name].mT
        state.basis = kept.get("basis")
        if "output" in kept:
            state.output = OutputFactor(kept["output"], kept.get("output_vectors"), bool(softmax))

    def forward(self, problem: Problem) -> AnyDirection:
        """Solve at the problem's own parameters.

        NaN where the problem is not finite, as other directions are; what later solves use then stays as it was.
        """
        kept = dict(vars(self._last.state))
        layer = problem.last_layer
        if layer is None and self.solver in ("cholesky", "pcg"):
            raise ValueError(f"solver must be cg or neumann for a whole model, got {self.solver!r}")
        if self.layers is not None:
            problem = problem.restricted(self.layers)
        solver = self.solver
        if layer is not None and self._in_rows(layer):
            found = self._of_rows(layer)
            if found is not None:
                return found
            if solver == "auto" and not cg.serves(layer.unlabeled.features):
                solver = "pcg"
        rhs = vectors.dense(single(self.of(problem)))
        try:
            if layer is not None and self.solver != "neumann":
                return self._closed_form(layer, of_last_layer(rhs), solver)
            return self._by_products(problem, rhs)
        except NotFiniteError:
            vars(self._last.state).update(kept)
            return vectors.scaled(rhs, math.nan)

    @property
    def inner(self) -> InnerLoss:
        """What H is the second derivative of."""
        return InnerLoss(self.loss, self.reduction, labeled_weight=1.0, labeled_loss=self.loss)

    def _in_rows(self, problem: LastLayerProblem) -> bool:
        """Whether the system is solved in the logit tangents of the examples."""
        if not isinstance(self.of, HoldoutGradient) or problem.process_group is not None or self.damping == 0:
            return False
        if self.curvature == "hessian" and not losses.of(self.loss).exact:
            return False
        if self.solver != "cg" and (self.solver != "auto" or self._last.state.is_preconditioned):
            return False
        (n, d), c = problem.unlabeled.features.shape, problem.unlabeled.logits.shape[1]
        if cg.in_one_launch(c, problem.unlabeled.features, None):
            return False
        others = len(problem.holdout.features) + (0 if problem.labeled is None else len(problem.labeled.features))
        return few_rows.pays(n + others, c, d + 1)

    def _of_rows(self, problem: LastLayerProblem) -> Factors | None:
        """The direction in factors; None: they do not reach the tolerance in time, or the input is not finite."""
        assert isinstance(self.of, HoldoutGradient)
        of = self.of
        given = problem.gradient_in_factors("holdout", loss=of.loss, reduction=of.reduction, bias=of.bias)
        parts = [(rows, targets, weights) for rows, targets, weights, _ in problem.inner_rows(self.inner)]
        if problem.labeled is not None:
            unweighted = problem.holdout.logits
            parts.append((problem.holdout, torch.zeros_like(unweighted), unweighted.new_zeros(len(unweighted))))
        features, logits = (torch.cat([rows[i] for rows, *_ in parts]) for i in range(2))
        reads_targets = losses.of(self.loss).curvature_reads_targets
        targets = torch.cat([targets for _, targets, _ in parts]) if reads_targets else None
        weights = torch.cat([weight for *_, weight in parts])
        rhs = torch.zeros_like(logits)
        rhs[-len(given.residual) :] = given.residual  # the hold-out examples are the last rows
        most, is_trial = self.max_iter, self.solver == "auto" and not cg.serves(features)
        if is_trial:
            n, c = logits.shape
            most = min(most // 2, trial_iterations(n, c, features.shape[1] + given.bias, in_row_space=True))
        answer = few_rows.solve_rows(
            features,
            logits,
            rhs,
            weights,
            bias=given.bias,
            loss=self.loss,
            damping=self.damping,
            tol=self.tol,
            max_iter=most,
            state=self._last.state_for(features),
            targets=targets,
        )
        solved = linear_solvers.Solved(answer.iterations, answer.residual)
        if not cg.capturing(features):
            if math.isnan(solved.residual) or (is_trial and solved.residual > self.tol):
                return None
            self._judge(linear_solvers.Solution(answer.coefficients, solved, answer.indefinite))
        self._last.solution = solved
        return Factors(features, answer.coefficients, given.bias, answer.tangent[: len(problem.unlabeled.logits)])

    def _closed_form(self, problem: LastLayerProblem, rhs: Direction, solver: str) -> Direction:
        if self.curvature == "hessian" and not losses.of(self.loss).exact:
            raise ValueError(f"curvature must be gauss_newton for {self.loss} at the last layer, or solver neumann")
        parts = problem.inner_rows(self.inner)
        reads_targets = losses.of(self.loss).curvature_reads_targets
        solution = ops.solve_hessian(
            torch.cat([rows.features for rows, *_ in parts]),
            torch.cat([rows.logits for rows, *_ in parts]),
            rhs.weight,
            rhs.bias,
            torch.cat([weights for _, _, weights, _ in parts]),
            loss=self.loss,
            damping=self.damping,
            solver=solver,
            tol=self.tol,
            max_iter=self.max_iter,
            targets=torch.cat([targets for _, targets, *_ in parts]) if reads_targets else None,
            state=self._last.state_for(rhs.weight),
            process_group=problem.process_group,
        )
        self._last.state.solution = None
        self._last.solution = solution
        if isinstance(solution[3], float) and not math.isfinite(solution[3]):
            raise NotFiniteError("the examples of another process are not finite")
        return Direction(solution.weight, solution.bias)

    def _by_products(self, problem: Problem, rhs: Dense) -> Dense:
        curved = problem.hessian(self.inner, self.curvature)

        def product(vector: Tensor) -> Tensor:
            return vectors.flat(curved(vectors.unflat(rhs, vector))).add_(vector, alpha=self.damping)

        v, group = vectors.flat(rhs), problem.process_group
        if self.solver == "neumann":
            solution = linear_solvers.neumann(
                product, v, tol=self.tol, max_iter=self.max_iter, step=self.step, group=group
            )
        else:
            solution = linear_solvers.conjugate_gradient(product, v, tol=self.tol, max_iter=self.max_iter, group=group)
        self._last.solution = solution.solved
        if not cg.capturing(v):
            if not math.isfinite(solution.solved.residual) and not bool((v + product(v)).isfinite().all()):
                raise NotFiniteError("the right-hand side or a product with the Hessian is not finite")
            self._judge(solution)
        return vectors.unflat(rhs, solution.vector)

    def _judge(self, solution: linear_solvers.Solution) -> None:
        """Raise or warn for what is no solution; nobody can while a CUDA graph is captured."""
        matrix = "Hessian" if self.curvature == "hessian" else "Gauss-Newton matrix"
        cure = "raise damping or take curvature='gauss_newton'" if self.curvature == "hessian" else "raise damping"
        iterations, residual = solution.solved.iterations, solution.solved.residual
        if solution.indefinite:
            raise torch.linalg.LinAlgError(
                f"the damped {matrix} is not positive definite (negative curvature along a direction of iteration "
                f"{iterations}); {cure}"
            )
        if self.solver == "neumann" and not residual <= 1:
            raise torch.linalg.LinAlgError(
                f"the Neumann series diverges (its power {iterations} of the damped {matrix} has {residual:.3g} times "
                f"the length of the direction): lower step, or, if there is negative curvature, {cure}"
            )
        if self.solver != "neumann" and not residual <= self.tol:
            warnings.warn(
                f"the inverse Hessian is not converged: relative residual {residual:.3g} > tol {self.tol:.3g} after "
                f"{iterations} iterations; raise damping or max_iter",
                NotConvergedWarning,
                stacklevel=2,
            )
