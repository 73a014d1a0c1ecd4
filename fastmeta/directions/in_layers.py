"""A direction in some layers of the model."""

from fastmeta.directions.rule import DirectionRule
from fastmeta.problem import AnyDirection, Problem, Trajectory
from fastmeta.state import Stateful


class InLayers(Stateful):
    """Another direction where only some layers of the model move; its gradients are taken by their parameters alone.

    Args:
        of: the rule.
        layers: names of modules or parameters, ``("block3", "fc")``.

    Raises:
        ValueError: nothing that moves has one of these names, or the problem is that of the last layer.
    """

    def __init__(self, of: DirectionRule, layers: tuple[str, ...]) -> None:
        super().__init__()
        if isinstance(layers, str):
            raise TypeError(f"layers must be a tuple of names, got the string {layers!r}")
        self.of = of
        self.layers = layers

    def forward(self, problem: Problem) -> AnyDirection | Trajectory:
        """The direction, a dict of those layers' parameters."""
        return self.of(problem.restricted(self.layers))
