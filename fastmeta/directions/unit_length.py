"""Another direction at length 1."""

from dataclasses import dataclass

from fastmeta.directions.holdout_gradient import HoldoutGradient
from fastmeta.directions.rule import DirectionRule
from fastmeta.problem import AnyDirection, Problem, single, vectors


@dataclass(frozen=True)
class UnitLength:
    """Another direction at length 1, ``v / ||v||`` over all of its tensors together; zero stays zero.

    Args:
        of: the rule to scale; several inner steps are scaled inside, ``LookAhead(UnitLength(...), steps=2)``.
    """

    of: DirectionRule = HoldoutGradient()

    def __call__(self, problem: Problem) -> AnyDirection:
        """The scaled direction; its length never leaves the device."""
        direction = single(self.of(problem), "; use LookAhead(UnitLength())")
        return vectors.scaled(direction, 1 / vectors.norm(direction))
