"""A direction times the inverse Hessian of the inner problem."""

from dataclasses import dataclass
from typing import Literal

import torch

from fastmeta import ops
from fastmeta.directions.holdout_gradient import HoldoutGradient
from fastmeta.directions.rule import DirectionRule
from fastmeta.problem import AnyProblem, Direction, Problem, Trajectory

Solver = Literal["auto", "cholesky", "cg", "pcg"]


@dataclass(frozen=True)
class InverseHessian:
    """``(H + damping I)^{-1} v`` of another direction, with H the Hessian of the inner problem at the last layer.

    Not All Unlabeled Data Are Equal, Eq. (6): H of ``C^T + C^U`` with cross-entropies. Leaving this rule out (H = I)
    is the identity approximation of Luketina et al. (2016).

    Args:
        of: the rule that gives v.
        damping: > 0; weight decay enters here.
        solver: ``auto``, ``cholesky`` (exact), ``cg`` or ``pcg``; see :func:`fastmeta.ops.solve_hessian`.
        tol: relative residual at which the iterative solvers stop.
        max_iter: and their limit.
        loss: the inner loss on the unlabeled examples, which is the labeled one too.
    """

    of: DirectionRule = HoldoutGradient()
    damping: float = 0.1
    solver: Solver = "auto"
    tol: float = 1e-4
    max_iter: int = 100
    loss: str = "cross_entropy"

    def __call__(self, problem: AnyProblem) -> Direction:
        """Solve at the problem's own logits."""
        if not isinstance(problem, Problem):
            raise TypeError("InverseHessian is for the last layer alone, got a whole model")
        direction = self.of(problem)
        if isinstance(direction, Trajectory):
            raise TypeError("of must give one direction, got those of several inner steps")
        assert not isinstance(direction, dict), "of a last layer"
        rhs = direction.dense()
        labeled, _ = problem.labeled_rows()
        parts = [(labeled, None), (problem.unlabeled, problem.inner_weights)]
        features = torch.cat([rows.features for rows, _ in parts])
        logits = torch.cat([rows.logits for rows, _ in parts])
        scaled = [problem.scaled_weights(rows, weights, "mean") for rows, weights in parts]
        solution = ops.solve_hessian(
            features,
            logits,
            rhs.weight,
            rhs.bias,
            torch.cat([weights for weights in scaled if weights is not None]),  # a mean always has weights
            loss=self.loss,
            damping=self.damping,
            solver=self.solver,
            tol=self.tol,
            max_iter=self.max_iter,
        )
        return Direction(solution.weight, solution.bias)
