"""Gradients with respect to labels."""

from dataclasses import dataclass

from torch import Tensor

from fastmeta import ops
from fastmeta.derivatives.derivative import Derivative, How, check_how, scaled, step_scale, weighted
from fastmeta.derivatives.of_model import label_tangent
from fastmeta.model_problem import AnyProblem
from fastmeta.problem import AnyDirection, Problem, Reduction


@dataclass(frozen=True)
class LabelGradient(Derivative):
    """``dG/dz_i = (rate w_i / B) T_i(v)``; ``T = D_v(-dl/dz)`` (``B = 1`` for a sum).

    Learning to Impute, Eq. (V1); Meta-Gradient, Eq. (13).

    Args:
        loss: the inner loss.
        rate: eta, the step size of the inner SGD.
        reduction: of the inner loss over its examples.
        how: ``last_layer``: in closed form, where only the last layer moves; else how the whole model's derivative is
            taken, see :func:`fastmeta.label_gradient`.
        radius: length of the perturbation of a difference.
    """

    loss: str = "mse_probs"
    rate: float = 1.0
    reduction: Reduction = "mean"
    how: How = "last_layer"
    radius: float = 0.01

    def __post_init__(self) -> None:
        check_how(self.how, self.radius)

    def at(self, problem: AnyProblem, direction: AnyDirection) -> Tensor:
        """``[N, C]``."""
        if isinstance(problem, Problem):
            return weighted(problem, self._last_layer(problem, direction))
        assert isinstance(direction, dict), "of a whole model"
        tangent = label_tangent(
            problem.function,
            problem.unlabeled,
            direction,
            problem.parameters,
            loss=self.loss,
            how=self.how,
            radius=self.radius,
            labels=lambda: problem.labels,
            see=problem.see,
            keep=problem.keep,
        )
        return weighted(problem, step_scale(problem, self.rate, self.reduction, len(tangent)) * tangent)

    def _last_layer(self, problem: Problem, direction: AnyDirection) -> Tensor:
        assert not isinstance(direction, dict), "of a last layer"
        rows, v = problem.unlabeled, direction.dense()
        scale = step_scale(problem, self.rate, self.reduction, len(problem.labels))
        return scaled(
            lambda factor: ops.label_gradient(
                rows.features, rows.logits, *v, loss=self.loss, scale=factor, targets=problem.labels
            ),
            scale,
        )
