"""Derivatives: how do the outputs on the unlabeled examples move along a direction?

A derivative maps a problem and a direction to the gradient of the outer loss G after an inner step of SGD at ``rate``,
with respect to the labels ``[N, C]`` or to the example weights ``[N]``. Here only the last layer moves, which has a
closed form: no double backward, no gradient for each example. Anything with the same call can take their place.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fastmeta import ops
from fastmeta.directions import norm
from fastmeta.problem import Direction, Factors, Problem, Reduction

Derivative = Callable[[Problem, Direction | Factors], Tensor]


def _scale(problem: Problem, rate: float, reduction: Reduction) -> float:
    return rate / max(len(problem.labels), 1) if reduction == "mean" else rate


def _weighted(problem: Problem, gradient: Tensor) -> Tensor:
    weights = problem.inner_weights
    return gradient if weights is None else gradient * weights.unsqueeze(-1)


@dataclass(frozen=True)
class LabelGradient:
    """``dG/dz_i = (rate w_i / B) T_i(v)``, exact at the last layer; ``T = D_v(-dl/dz)`` (``B = 1`` for a sum).

    Learning to Impute, Eq. (V1); Meta-Gradient, Eq. (13).

    Args:
        loss: the inner loss.
        rate: eta, the step size of the inner SGD.
        reduction: of the inner loss over its examples.
    """

    loss: str = "mse_probs"
    rate: float = 1.0
    reduction: Reduction = "mean"

    def __call__(self, problem: Problem, direction: Direction | Factors) -> Tensor:
        """``[N, C]``."""
        rows, v = problem.unlabeled, direction.dense()
        scale = _scale(problem, self.rate, self.reduction)
        gradient = ops.label_gradient(rows.features, rows.logits, v.weight, v.bias, loss=self.loss, scale=scale)
        return _weighted(problem, gradient)


@dataclass(frozen=True)
class FiniteDifference:
    """The same with central differences of the predictions in place of their derivative.

    ``dG/dz_i = (rate w_i / (B epsilon)) (p(theta + epsilon v) - p(theta - epsilon v))``, ``epsilon = radius / ||v||``:
    Meta-Gradient, Eq. (16), for the squared error on probabilities. At the published radius of 0.01 this is a finite
    probe, not the derivative.

    Args:
        radius: length of the perturbation of the last layer.
        rate: alpha, the step size of the inner SGD.
        reduction: of the inner loss over its examples.
    """

    radius: float = 0.01
    rate: float = 1.0
    reduction: Reduction = "mean"

    def __call__(self, problem: Problem, direction: Direction | Factors) -> Tensor:
        """``[N, C]``."""
        plus, minus, epsilon = self.probes(problem, direction)
        zero = plus.new_zeros(plus.shape)
        step = -self.scale(problem)
        gradient = ops.finite_difference_labels(plus, minus, zero, epsilon, step=step, project=False)
        return _weighted(problem, gradient)

    def scale(self, problem: Problem) -> float:
        """``rate / B``, or ``rate`` for a sum."""
        return _scale(problem, self.rate, self.reduction)

    def probes(self, problem: Problem, direction: Direction | Factors) -> tuple[Tensor, Tensor, Tensor]:
        """Logits at ``theta + epsilon v`` and at ``theta - epsilon v``, and epsilon, which stays on the device.

        The last layer is linear in its parameters, so its perturbed logits are ``f +- epsilon z``.
        """
        rows, v = problem.unlabeled, direction.dense()
        z = rows.features @ v.weight.T
        if v.bias is not None:
            z = z + v.bias
        epsilon = self.radius / norm(v)
        return rows.logits + epsilon * z, rows.logits - epsilon * z, epsilon


@dataclass(frozen=True)
class FeatureSimilarity:
    """Residuals of the hold-out examples, weighted by feature similarity: ``rate sum_h (h_u^T h_h) r_h``.

    Learning to Impute (journal version), Eq. (6), as printed: without the bias's ``+ 1``, without the softmax Jacobian
    of the inner loss. With ``bias=True`` and cross-entropy inside it is :class:`LabelGradient` up to a constant in
    each row, to which a softmax imputer is blind.

    Args:
        rate: eta.
        bias: whether the bias moves as well.
        reduction: ``sum`` as printed; ``mean`` divides by B.
    """

    rate: float = 1.0
    bias: bool = False
    reduction: Reduction = "sum"

    def __call__(self, problem: Problem, direction: Direction | Factors) -> Tensor:
        """``[N, C]``.

        Raises:
            TypeError: the direction is not factored.
        """
        if not isinstance(direction, Factors):
            raise TypeError("direction must be Factors, from HoldoutGradient(factored=True), got Direction")
        scale = _scale(problem, self.rate, self.reduction)
        bias = self.bias and direction.bias
        features = problem.unlabeled.features
        gradient = ops.feature_similarity(features, direction.features, direction.residual, scale=scale, bias=bias)
        return _weighted(problem, gradient)


@dataclass(frozen=True)
class ExampleWeightGradient:
    """``dG/dw_i = -(rate m_i / B) <grad l_i, v>`` with no gradient of an example in memory.

    With ``v = H^{-1} grad L_val``, rate 1 and ``reduction="sum"`` this is the influence of an example's weight on the
    validation loss: Not All Unlabeled Data Are Equal, Eq. (6).

    Args:
        loss: the inner loss.
        rate: factor of the inner step.
        reduction: of the inner loss over its examples.
        masked: whether the mask belongs to the example's loss; the official code leaves it out here.
    """

    loss: str = "cross_entropy"
    rate: float = 1.0
    reduction: Reduction = "sum"
    masked: bool = True

    def __call__(self, problem: Problem, direction: Direction | Factors) -> Tensor:
        """``[N]``."""
        rows, v = problem.unlabeled, direction.dense()
        dot = ops.per_example_dot(rows.features, rows.logits, problem.labels, v.weight, v.bias, loss=self.loss)
        gradient = dot * -_scale(problem, self.rate, self.reduction)
        return gradient * problem.mask if self.masked and problem.mask is not None else gradient
