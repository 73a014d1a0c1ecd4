"""The gradient of the hold-out loss."""

from dataclasses import dataclass

from fastmeta import losses
from fastmeta.problem import AnyDirection, AnyProblem, Factors, Problem, Reduction


@dataclass(frozen=True)
class HoldoutGradient:
    """Gradient of the mean hold-out loss, ``v = grad C^H`` (Learning to Impute, Eq. (V1); Meta-Gradient, Eq. (14)).

    Args:
        loss: the outer loss.
        bias: False leaves the last layer's bias out of the direction (last layer alone).
        factored: return :class:`fastmeta.problem.Factors`, which :class:`fastmeta.derivatives.FeatureSimilarity` needs
            (last layer alone).
        reduction: mean, or sum over the hold-out examples.
    """

    loss: str = "cross_entropy"
    bias: bool = True
    factored: bool = False
    reduction: Reduction = "mean"

    def __call__(self, problem: AnyProblem) -> AnyDirection:
        """The direction at the problem's parameters."""
        if not isinstance(problem, Problem):
            if self.factored or not self.bias:
                raise ValueError("factored and bias=False are for the last layer alone, got a whole model")
            return problem.gradient("holdout", loss=self.loss, reduction=self.reduction)
        if not self.factored:
            return problem.gradient("holdout", loss=self.loss, reduction=self.reduction, bias=self.bias)
        rows = problem.holdout
        targets = losses.as_probabilities(problem.targets, rows.logits.shape[1], rows.logits.dtype)
        residual = losses.residual(rows.logits, targets, self.loss)
        scale = problem.mean_scale(len(residual)) if self.reduction == "mean" else 1.0
        return Factors(rows.features, residual * scale, self.bias and problem.has_bias)
