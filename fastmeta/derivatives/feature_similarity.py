"""Label gradients by feature similarity."""

from dataclasses import dataclass

from torch import Tensor

from fastmeta import ops
from fastmeta.derivatives.derivative import Derivative, scaled, step_scale, weighted
from fastmeta.model_problem import AnyProblem
from fastmeta.problem import AnyDirection, Factors, Problem, Reduction


@dataclass(frozen=True)
class FeatureSimilarity(Derivative):
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

    def at(self, problem: AnyProblem, direction: AnyDirection) -> Tensor:
        """``[N, C]``.

        Raises:
            TypeError: the direction is not factored.
        """
        if not isinstance(direction, Factors) or not isinstance(problem, Problem):
            raise TypeError("direction must be Factors, from HoldoutGradient(factored=True), got Direction")
        scale = step_scale(problem, self.rate, self.reduction, len(problem.labels))
        bias = self.bias and direction.bias
        features = problem.unlabeled.features
        holdout, residual, _ = direction
        gradient = scaled(
            lambda factor: ops.feature_similarity(features, holdout, residual, scale=factor, bias=bias), scale
        )
        return weighted(problem, gradient)
