"""A direction in some layers of the model."""

from dataclasses import dataclass

from fastmeta.directions.rule import DirectionRule
from fastmeta.model_problem import AnyProblem, Trajectory
from fastmeta.problem import AnyDirection, Problem


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

    def __call__(self, problem: AnyProblem) -> AnyDirection | Trajectory:
        """The direction, a dict of those layers' parameters."""
        if isinstance(problem, Problem):
            raise ValueError(f"layers must be None where only the last layer moves, got {self.layers}")
        return self.of(problem.restricted(self.layers))
