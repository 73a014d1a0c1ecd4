"""Another direction at length 1."""

from dataclasses import dataclass

from fastmeta import vectors
from fastmeta.directions.holdout_gradient import HoldoutGradient
from fastmeta.directions.rule import DirectionRule
from fastmeta.model_problem import AnyProblem, Trajectory
from fastmeta.problem import AnyDirection


@dataclass(frozen=True)
class UnitLength:
    """Another direction at length 1, ``v / ||v||`` over all of its tensors together; zero stays zero.

    Args:
        of: the rule to scale; several inner steps are scaled inside, ``LookAhead(UnitLength(...), steps=2)``.
    """

    of: DirectionRule = HoldoutGradient()

    def __call__(self, problem: AnyProblem) -> AnyDirection:
        """The scaled direction; its length never leaves the device."""
        direction = self.of(problem)
        if isinstance(direction, Trajectory):
            raise TypeError("of must give one direction, got those of several inner steps; use LookAhead(UnitLength())")
        return vectors.scaled(direction, 1 / vectors.norm(direction))
