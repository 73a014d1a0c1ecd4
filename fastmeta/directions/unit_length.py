"""Another direction at length 1."""

from fastmeta.directions.holdout_gradient import HoldoutGradient
from fastmeta.directions.rule import DirectionRule
from fastmeta.problem import AnyDirection, Problem, single, vectors
from fastmeta.state import Stateful


class UnitLength(Stateful):
    """Another direction at length 1, ``v / ||v||`` over all of its tensors together; zero stays zero.

    Args:
        of: the rule to scale; several inner steps are scaled inside, ``LookAhead(UnitLength(...), steps=2)``.
    """

    def __init__(self, of: DirectionRule | None = None) -> None:
        super().__init__()
        self.of: DirectionRule = HoldoutGradient() if of is None else of

    def forward(self, problem: Problem) -> AnyDirection:
        """The scaled direction; its length never leaves the device."""
        direction = single(self.of(problem), "; use LookAhead(UnitLength())")
        return vectors.scaled(direction, 1 / problem.length(direction))
