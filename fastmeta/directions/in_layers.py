"""A direction in some layers of the model."""

from dataclasses import dataclass

from fastmeta.directions.rule import DirectionRule
from fastmeta.problem import AnyDirection, Problem, Trajectory


@dataclass(frozen=True)
class InLayers:
    """Another direction where only some layers of the model move; its gradients are taken by their parameters alone.

    Args:
        of: the rule.
        layers: names of modules or parameters, ``("block3", "fc")``.

    Raises:
        ValueError: nothing that moves has one of these names, or the problem is that of the last layer.
    """

    of: DirectionRule
    layers: tuple[str, ...]

    def __post_init__(self) -> None:
        if isinstance(self.layers, str):
            raise TypeError(f"layers must be a tuple of names, got the string {self.layers!r}")

    def __call__(self, problem: Problem) -> AnyDirection | Trajectory:
        """The direction, a dict of those layers' parameters."""
        return self.of(problem.restricted(self.layers))
