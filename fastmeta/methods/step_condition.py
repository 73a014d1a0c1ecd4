"""The step-size condition of Meta-Gradient's convergence theorem, estimated at the model's present parameters."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastmeta import checks, losses
from fastmeta.problem import WholeModelProblem, full_precision, vectors
from fastmeta.problem.model_function import LossOfLogits, Vector

Apply = Callable[[Vector], Vector]


class StepCondition(NamedTuple):
    """What the theorem says about a step on the labels."""

    lipschitz: float
    """L_0, of the gradient of the labeled loss"""
    jacobian_norm: float
    """M, of the unlabeled predictions"""
    largest_step: float
    """beta below which the theorem holds"""
    satisfied: bool
    """whether the present beta is below it"""


def step_condition(
    problem: WholeModelProblem, *, alphas: tuple[float, float], step: float, iterations: int = 20
) -> StepCondition:
    r"""Estimate :math:`\alpha^2 \beta < 1 / (4 M^2 L_0)`, under which a step of Algorithm 1 lowers the labeled loss G.

    The theorem (slides, Eq. (7)-(9)) asks for a Lipschitz constant :math:`L_0` of the gradient of G and a bound M of
    the Jacobian of the predictions p, everywhere. This is a **local estimate and not a bound**: :math:`L_0` is the
    largest absolute eigenvalue of the Hessian of G at the present parameters, and M the root mean square
    :math:`\sqrt{\lambda_{max}(\tfrac1B \sum_i J_i^T J_i)}` over the B examples at hand, both by power iteration, which
    comes from below. The theorem's proof on a batch uses no more of M than that, since the step is
    :math:`-4 \alpha^2 \beta / B` times that mean matrix times grad G; a factor of 2 B is to spare, as long as
    :math:`L_0` holds along the step.

    Args:
        problem: the B unlabeled examples, the labeled ones of G (its hold-out examples), and the model.
        alphas: of the inner step and of the model's own; their product is ``alpha^2``.
        step: the present beta.
        iterations: of each power iteration; about three passes each.

    Returns:
        Plain numbers; ``largest_step`` is infinite where G is flat or nothing moves the predictions.
    """
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations must be an int >= 1, got {iterations!r}")
    for alpha in alphas:
        checks.number(alpha, "alpha", low=0.0)
    function, unlabeled = problem.function, problem.unlabeled
    count = max(len(problem.logits), 1)

    def gram(direction: Vector) -> Vector:
        """``(1/B) sum_i J_i^T J_i v``."""
        logits, tangent = function.jvp(unlabeled, direction)
        logits, tangent = full_precision(logits), full_precision(tangent)
        moved = losses.softmax_jacobian(logits.softmax(-1), tangent) / count
        return function.gradient(unlabeled, _product_with(moved))[0]

    hessian = function.hessian([problem.term("holdout", "cross_entropy", "mean")])
    lipschitz = _largest_eigenvalue(hessian, function.parameters, iterations)
    squared = _largest_eigenvalue(gram, function.parameters, iterations)
    curvature = 4 * squared * lipschitz * alphas[0] * alphas[1]
    largest = 1 / curvature if curvature > 0 else float("inf")
    return StepCondition(lipschitz, squared**0.5, largest, step < largest)


def _product_with(cotangent: Tensor) -> LossOfLogits:
    return lambda logits: (full_precision(logits).softmax(-1) * cotangent).sum()


def _largest_eigenvalue(apply: Apply, like: Vector, iterations: int) -> float:
    """The largest absolute eigenvalue of a symmetric matrix, from a start that is the same in every call."""
    generator = torch.Generator().manual_seed(0)
    v: Vector = {
        name: torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
        for name, value in like.items()
    }
    length = vectors.norm(v)
    for _ in range(iterations):
        v = apply({name: value / length for name, value in v.items()})
        length = vectors.norm(v)
        # Where everything is 0, so is the estimate: the norm alone never is.
        if not any(bool(value.any()) for value in v.values()):
            return 0.0
    return float(length)
