"""What a direction rule is."""

from typing import Protocol

from fastmeta.problem import AnyDirection, Problem, Trajectory


class DirectionRule(Protocol):
    """Maps a problem to a direction, or to the directions of several inner steps."""

    def __call__(self, problem: Problem, /) -> AnyDirection | Trajectory:
        """The direction at the problem's parameters."""
        ...
