"""What a direction rule is."""

from typing import Protocol

from fastmeta.model_problem import AnyProblem, Trajectory
from fastmeta.problem import AnyDirection


class DirectionRule(Protocol):
    """Maps a problem to a direction, or to the directions of several inner steps."""

    def __call__(self, problem: AnyProblem, /) -> AnyDirection | Trajectory:
        """The direction at the problem's parameters."""
        ...
