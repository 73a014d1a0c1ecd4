"""Gradients with respect to labels and example weights, of one pass."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastmeta import checks, losses, ops
from fastmeta.derivatives.derivative import Derivative, How, check_how, step_scale, weighted
from fastmeta.derivatives.of_model import difference, leaves, mixed
from fastmeta.model_problem import AnyProblem, ModelProblem, full_precision
from fastmeta.problem import AnyDirection, Problem, Reduction


@dataclass(frozen=True)
class LabelAndWeightGradient(Derivative):
    """``dG/dz_i = (rate w_i / B) T_i(v)`` and in a last column ``dG/dw_i = -(rate m_i / B) D_v l_i``.

    What :class:`LabelGradient` and :class:`ExampleWeightGradient` give, both of the same inner step on ``w_i l(f_i,
    z_i)``. Where the whole model moves, one pass of forward mode (or one set of perturbed passes) serves both.

    Args:
        loss: the inner loss.
        rate: eta, the step size of the inner SGD.
        reduction: of the inner loss over its examples.
        how: ``last_layer``: in closed form, where only the last layer moves; else how the whole model's derivative is
            taken, see :func:`fastmeta.label_gradient`.
        radius: length of the perturbation of a difference.
    """

    loss: str = "cross_entropy"
    rate: float = 1.0
    reduction: Reduction = "mean"
    how: How = "last_layer"
    radius: float = 0.01

    def __post_init__(self) -> None:
        check_how(self.how, self.radius)
        checks.loss_code(self.loss)

    def at(self, problem: AnyProblem, direction: AnyDirection) -> Tensor:
        """``[N, C + 1]``."""
        if isinstance(problem, Problem):
            assert not isinstance(direction, dict), "of a last layer"
            rows, v = problem.unlabeled, direction.dense()
            label = ops.label_gradient(
                rows.features, rows.logits, v.weight, v.bias, loss=self.loss, targets=problem.labels
            )
            slope = ops.per_example_dot(rows.features, rows.logits, problem.labels, v.weight, v.bias, loss=self.loss)
        else:
            assert isinstance(direction, dict), "of a whole model"
            label, slope = self._of_model(problem, direction)
        weight = -slope if problem.mask is None else -slope * problem.mask
        scale = step_scale(problem, self.rate, self.reduction, len(label))
        return scale * torch.cat([weighted(problem, label), weight.unsqueeze(-1)], dim=1)

    def _of_model(self, problem: ModelProblem, direction: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """``T_i(v) [N, C]`` and ``D_v l_i [N]``."""
        function, inputs = problem.function, problem.unlabeled
        if self.how == "double_backward":
            theta = leaves(function, problem.parameters)
            with torch.enable_grad():
                logits = problem.see(function.logits(inputs, theta, twice=True))
                labels = problem.labels.detach().clone().requires_grad_()
                weights = logits.new_ones(len(logits)).requires_grad_()
                total = (weights * losses.loss_per_example(logits, labels, self.loss)).sum()
            pulls, slopes = mixed(function, total, theta, direction, [labels, weights])
            return -pulls, slopes
        if self.how == "jvp":
            logits, tangent = function.jvp(inputs, direction, problem.parameters, on_graph=problem.keep is not None)
            if problem.keep is not None:
                problem.keep(logits)
            logits, tangent = problem.see(logits.detach()), full_precision(tangent)
            residual = losses.residual(logits, problem.labels, self.loss)
            return losses.label_tangent(logits, tangent, self.loss, problem.labels), (residual * tangent).sum(-1)

        if self.how == "finite_difference":
            _ = problem.labels  # imputed at theta, which the passes below are not

        def of(logits: Tensor) -> Tensor:
            logits = full_precision(logits)
            values = losses.loss_per_example(logits, problem.labels, self.loss)
            return torch.cat([losses.label_pull(logits, self.loss, problem.labels), values.unsqueeze(-1)], dim=1)

        both = difference(function, inputs, direction, problem.parameters, of, self.how, self.radius, problem.see)
        return both[:, :-1], both[:, -1]
