"""What a derivative is."""

from typing import Literal

from torch import Tensor

from fastmeta.problem import AnyDirection, AnyProblem, Reduction, Trajectory

How = Literal["double_backward", "jvp", "finite_difference", "forward_difference", "last_layer"]
HOWS: tuple[How, ...] = ("double_backward", "jvp", "finite_difference", "forward_difference", "last_layer")
WHOLE_MODEL: tuple[How, ...] = HOWS[:-1]


class Derivative:
    """Maps a problem and a direction to the gradient of the outer loss G after inner steps of SGD.

    With respect to the labels ``[N, C]`` or to the example weights ``[N]``. Subclasses give :meth:`at`, the derivative
    for one step; for the steps of a :class:`fastmeta.problem.Trajectory` they add up.
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


def step_scale(problem: AnyProblem, rate: float, reduction: Reduction, count: int) -> float:
    """``rate / B`` for a mean over the B examples of the joined batch, ``rate`` for a sum."""
    return float(rate * problem.mean_scale(count)) if reduction == "mean" else rate


def weighted(problem: AnyProblem, gradient: Tensor) -> Tensor:
    """Every row times its inner weight."""
    weights = problem.inner_weights
    return gradient if weights is None else gradient * weights.unsqueeze(-1)
