"""Gradients with respect to example weights."""

from dataclasses import dataclass

from torch import Tensor

from fastmeta import checks, losses, ops
from fastmeta.derivatives.derivative import Derivative, How, check_how, step_scale
from fastmeta.derivatives.of_model import loss_tangent
from fastmeta.model_problem import AnyProblem
from fastmeta.problem import AnyDirection, Problem, Reduction, RowFactors


@dataclass(frozen=True)
class ExampleWeightGradient(Derivative):
    """``dG/dw_i = -(rate m_i / B) <grad l_i, v>`` with no gradient of an example in memory.

    With ``v = H^{-1} grad L_val``, rate 1 and ``reduction="sum"`` this is the influence of an example's weight on the
    validation loss: Not All Unlabeled Data Are Equal, Eq. (6).

    Args:
        loss: the inner loss.
        rate: factor of the inner step.
        reduction: of the inner loss over its examples.
        masked: whether the mask belongs to the example's loss; the official code leaves it out here.
        how: ``last_layer``: in closed form, where only the last layer moves; else how the whole model's derivative is
            taken, see :func:`fastmeta.example_weight_gradient`.
        radius: length of the perturbation of a difference.
    """

    loss: str = "cross_entropy"
    rate: float = 1.0
    reduction: Reduction = "sum"
    masked: bool = True
    how: How = "last_layer"
    radius: float = 0.01

    def __post_init__(self) -> None:
        check_how(self.how, self.radius)
        checks.loss_code(self.loss)

    def at(self, problem: AnyProblem, direction: AnyDirection) -> Tensor:
        """``[N]``."""
        if isinstance(problem, Problem):
            assert not isinstance(direction, dict), "of a last layer"
            rows = problem.unlabeled
            if isinstance(direction, RowFactors) and direction.tangent is not None:
                slope = (losses.residual(rows.logits, problem.labels, self.loss) * direction.tangent).sum(-1)
            else:
                v = direction.dense()
                slope = ops.per_example_dot(
                    rows.features, rows.logits, problem.labels, v.weight, v.bias, loss=self.loss
                )
        else:
            assert isinstance(direction, dict), "of a whole model"
            slope = loss_tangent(
                problem.function,
                problem.unlabeled,
                lambda: problem.labels,
                direction,
                problem.parameters,
                loss=self.loss,
                how=self.how,
                radius=self.radius,
                see=problem.see,
            )
        gradient = slope * -step_scale(problem, self.rate, self.reduction, len(slope))
        return gradient * problem.mask if self.masked and problem.mask is not None else gradient
