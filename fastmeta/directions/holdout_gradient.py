"""The gradient of the hold-out loss."""

from dataclasses import dataclass

from fastmeta.problem import AnyDirection, Problem, Reduction


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

    def __call__(self, problem: Problem) -> AnyDirection:
        """The direction at the problem's parameters."""
        gradient = problem.gradient_in_factors if self.factored else problem.gradient
        return gradient("holdout", loss=self.loss, reduction=self.reduction, bias=self.bias)
