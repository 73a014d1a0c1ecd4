"""What a derivative is."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from fastmeta import checks
from fastmeta.model_problem import AnyProblem, Trajectory
from fastmeta.problem import AnyDirection, Reduction

How = Literal["double_backward", "jvp", "finite_difference", "forward_difference", "last_layer"]
HOWS: tuple[How, ...] = ("double_backward", "jvp", "finite_difference", "forward_difference", "last_layer")
WHOLE_MODEL: tuple[How, ...] = HOWS[:-1]


class Derivative:
    """Maps a problem and a direction to the gradient of the outer loss G after inner steps of SGD.

    With respect to the labels ``[N, C]`` or to the example weights ``[N]``. Subclasses give :meth:`at`, the derivative
    for one step; for the steps of a :class:`fastmeta.model_problem.Trajectory` they add up.
    """

    how: How = "last_layer"

    def __call__(self, problem: AnyProblem, direction: AnyDirection | Trajectory) -> Tensor:
        """``[N, C]`` or ``[N]``."""
        if not isinstance(direction, Trajectory):
            return self.at(problem, direction)
        first, *others = [self.at(*step) for step in direction.steps]
        for other in others:
            first = first + other
        return first

    def at(self, problem: AnyProblem, direction: AnyDirection) -> Tensor:
        """The derivative for one inner step."""
        raise NotImplementedError


def check_how(how: object, radius: object) -> None:
    """Raise unless ``how`` is one of :data:`HOWS` and the radius of a difference is > 0."""
    if how not in HOWS:
        raise ValueError(f"how must be one of {', '.join(HOWS)}, got {how!r}")
    if checks.number(radius, "radius") <= 0:
        raise ValueError(f"radius must be > 0, got {radius}")


def step_scale(problem: AnyProblem, rate: float, reduction: Reduction, count: int) -> float | Tensor:
    """``rate / B`` for a mean over the B examples of the joined batch, ``rate`` for a sum.

    A scalar tensor where several processes count B on their GPUs, so that no host waits for them.
    """
    return rate * problem.mean_scale(count) if reduction == "mean" else rate


def scaled(operator: Callable[[float], Tensor], scale: float | Tensor) -> Tensor:
    """What an operator gives for a scale, which it takes as a number."""
    return operator(1.0) * scale if isinstance(scale, Tensor) else operator(scale)


def weighted(problem: AnyProblem, gradient: Tensor) -> Tensor:
    """Every row times its inner weight."""
    weights = problem.inner_weights
    return gradient if weights is None else gradient * weights.unsqueeze(-1)
