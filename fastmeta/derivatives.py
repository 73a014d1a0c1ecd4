"""Derivatives: how do the outputs on the unlabeled examples move along a direction?

A derivative maps a problem and a direction to the gradient of the outer loss G after an inner step of SGD at ``rate``,
with respect to the labels ``[N, C]`` or to the example weights ``[N]``. Where only the last layer moves it has a closed
form: no double backward, no gradient for each example. Where the whole model moves, ``how`` says how it is computed.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastmeta import checks, ops
from fastmeta.problem import HOWS, AnyDirection, How, Problem, Reduction, Trajectory, check_how, steps_of

__all__ = [
    "HOWS",
    "Derivative",
    "ExampleWeightGradient",
    "FeatureSimilarity",
    "FiniteDifference",
    "How",
    "LabelAndWeightGradient",
    "LabelGradient",
]


class Derivative:
    """Maps a problem and a direction to the gradient of the outer loss G after inner steps of SGD.

    With respect to the labels ``[N, C]`` or to the example weights ``[N]``. Subclasses give :meth:`at`, the derivative
    for one step; for the steps of a :class:`fastmeta.problem.Trajectory` they add up.
    """

    how: How = "last_layer"
    radius: float = 0.01
    of_weights: ClassVar[bool] = False
    """whether it is, at least in part, with respect to the example weights"""

    def __call__(self, problem: Problem, direction: AnyDirection | Trajectory) -> Tensor:
        """``[N, C]`` or ``[N]``."""
        first, *others = [self.at(where.by(self.how, self.radius), v) for where, v in steps_of(problem, direction)]
        for other in others:
            first = first + other
        return first

    def at(self, problem: Problem, direction: AnyDirection) -> Tensor:
        """The derivative for one inner step."""
        raise NotImplementedError


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

    def at(self, problem: Problem, direction: AnyDirection) -> Tensor:
        """``[N, C]``."""
        gradient = problem.label_tangent(direction, loss=self.loss, rate=self.rate, reduction=self.reduction)
        return weighted(problem, gradient)


@dataclass(frozen=True)
class ExampleWeightGradient(Derivative):
    """``dG/dw_i = -(rate m_i / B) <grad l_i, v>`` with no gradient of an example in memory.

    With ``v = H^{-1} grad L_val``, rate 1 and ``reduction="sum"`` this is the influence of an example's weight on the
    validation loss: Not All Unlabeled Data Are Equal, Eq. (6).

    Args:
        loss: the inner loss.
        rate: factor of the inner step.
        reduction: of the inner loss over its examples.
        masked: whether the mask multiplies the example's loss; the official code leaves it out here.
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
    of_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_how(self.how, self.radius)
        checks.loss_code(self.loss)

    def at(self, problem: Problem, direction: AnyDirection) -> Tensor:
        """``[N]``."""
        if problem.labels_are_predictions:
            return problem.labels.new_zeros(len(problem.labels))
        slope = problem.loss_tangent(direction, loss=self.loss)
        gradient = slope * -problem.step_scale(self.rate, self.reduction, len(slope))
        return gradient * problem.mask if self.masked and problem.mask is not None else gradient


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
    of_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_how(self.how, self.radius)
        checks.loss_code(self.loss)

    def at(self, problem: Problem, direction: AnyDirection) -> Tensor:
        """``[N, C + 1]``."""
        if problem.labels_are_predictions:
            label = problem.label_tangent(direction, loss=self.loss)
            slope = label.new_zeros(len(label))
        else:
            label, slope = problem.label_and_loss_tangent(direction, loss=self.loss)
        weight = -slope if problem.mask is None else -slope * problem.mask
        scale = problem.step_scale(self.rate, self.reduction, len(label))
        return scale * torch.cat([weighted(problem, label), weight.unsqueeze(-1)], dim=1)


@dataclass(frozen=True)
class FeatureSimilarity(Derivative):
    """Residuals of the hold-out examples, weighted by feature similarity: ``rate sum_h (h_u^T h_h) r_h``.

    Learning to Impute (journal version), Eq. (6), as printed: without the bias's ``+ 1``, without the softmax Jacobian
    of the inner loss. With ``bias=True`` and cross-entropy as inner loss it is :class:`LabelGradient` up to a constant
    in each row, which a softmax imputer cancels.

    Args:
        rate: eta.
        bias: whether the bias moves as well.
        reduction: ``sum`` as printed; ``mean`` divides by B.
    """

    rate: float = 1.0
    bias: bool = False
    reduction: Reduction = "sum"

    def at(self, problem: Problem, direction: AnyDirection) -> Tensor:
        """``[N, C]``.

        Raises:
            TypeError: the direction is not factored.
        """
        gradient = problem.feature_similarity(direction, bias=self.bias, rate=self.rate, reduction=self.reduction)
        return weighted(problem, gradient)


@dataclass(frozen=True)
class FiniteDifference(Derivative):
    """``dG/dz_i = (rate w_i / (B epsilon)) (p(theta + epsilon v) - p(theta - epsilon v))``, a central difference.

    ``epsilon = radius / ||v||``: Meta-Gradient, Eq. (16), for the squared error on probabilities. At the published
    radius of 0.01 this is a finite probe, not the derivative.

    Args:
        radius: length of the perturbation.
        rate: alpha, the step size of the inner SGD.
        reduction: of the inner loss over its examples.
        how: ``last_layer`` perturbs the last layer alone, ``finite_difference`` the whole model, in place, and
            ``forward_difference`` to one side only: ``2 (p(theta + epsilon v) - p(theta)) / epsilon``.
    """

    radius: float = 0.01
    rate: float = 1.0
    reduction: Reduction = "mean"
    how: Literal["last_layer", "finite_difference", "forward_difference"] = "last_layer"

    def __post_init__(self) -> None:
        if self.how not in ("last_layer", "finite_difference", "forward_difference"):
            raise ValueError(f"how must be one of last_layer, finite_difference, forward_difference, got {self.how!r}")
        check_how(self.how, self.radius)

    def at(self, problem: Problem, direction: AnyDirection) -> Tensor:
        """``[N, C]``."""
        plus, minus, epsilon = self.probes(problem, direction)
        zero = plus.new_zeros(plus.shape)
        step, epsilon = self.step_over(epsilon, problem, -1.0)
        gradient = ops.finite_difference_labels(plus, minus, zero, epsilon, step=step, project=False)
        return weighted(problem, gradient)

    def probes(self, problem: Problem, direction: AnyDirection) -> tuple[Tensor, Tensor, Tensor]:
        """Logits at ``theta + epsilon v`` and at ``theta - epsilon v``, and epsilon, which stays on the device."""
        return problem.by(self.how, self.radius).probes(direction, self.radius)

    def step_over(self, epsilon: Tensor, problem: Problem, step: float) -> tuple[float, Tensor]:
        """``step rate / B`` (``step rate`` for a sum) and epsilon, as :func:`ops.finite_difference_labels` takes them.

        Where ``rate / B`` is a tensor on the device, epsilon is divided by it instead.
        """
        scale = problem.step_scale(self.rate, self.reduction, len(problem.labels))
        return (step, epsilon / scale.to(epsilon)) if isinstance(scale, Tensor) else (step * scale, epsilon)


def weighted(problem: Problem, gradient: Tensor) -> Tensor:
    """Every row ``[N, C]`` times its inner weight."""
    weights = problem.inner_weights
    return gradient if weights is None else gradient * weights.unsqueeze(-1)
