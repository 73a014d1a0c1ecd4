"""The gradient of the hold-out loss."""

from dataclasses import dataclass

import torch

from fastmeta import losses
from fastmeta.model_problem import AnyProblem
from fastmeta.problem import AnyDirection, Direction, Factors, Problem, Reduction


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
        if problem.process_group is not None:
            bias = self.bias and problem.has_bias
            return _factors(problem.gradient("holdout", loss=self.loss, reduction=self.reduction, bias=bias))
        rows = problem.holdout
        targets = losses.as_probabilities(problem.targets, rows.logits.shape[1], rows.logits.dtype)
        residual = losses.residual(rows.logits, targets, self.loss)
        scale = problem.mean_scale(len(residual)) if self.reduction == "mean" else 1.0
        return Factors(rows.features, residual * scale, self.bias and problem.has_bias)


def _factors(direction: Direction) -> Factors:
    """A direction of examples on several processes, with C + 1 rows in place of theirs.

    ``V = R^T h`` with R = s I and h = V / s; a last row h = 0 makes the sum of R the bias. Scale s: so large that no
    V / s overflows, and no larger, so that ``s + (b - s)`` is b.
    """
    weight, bias = direction
    identity = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    if bias is None:
        return Factors(weight, identity, False)
    scale = torch.stack([weight.abs().amax(), bias.abs().amax()]).amax().clamp_min(torch.finfo(weight.dtype).tiny)
    features = torch.cat([weight / scale, torch.zeros_like(weight[:1])])
    return Factors(features, torch.cat([scale * identity, (bias - scale).unsqueeze(0)]), True)
