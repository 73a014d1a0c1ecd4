"""Directions of the parameters, in four forms with one arithmetic in :mod:`fastmeta.problem.vectors`.

The last layer moves along a :class:`Direction` or along :class:`Factors` of one, a whole model along a dict of tensors
by parameter name; a :class:`Trajectory` holds the directions of several inner steps.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from torch import Tensor

if TYPE_CHECKING:
    from fastmeta.problem import Problem

Vector = dict[str, Tensor]


class Direction(NamedTuple):
    """How the last layer moves."""

    weight: Tensor  # V [C, D]
    bias: Tensor | None  # b [C]; None: the bias stays

    def dense(self) -> "Direction":
        """Itself; see :meth:`Factors.dense`."""
        return self


class Factors(NamedTuple):
    """A direction ``V = R^T h``, ``b = sum R`` that is not multiplied out: the gradient of a loss on few examples."""

    features: Tensor  # h [Nh, D]
    residual: Tensor  # R [Nh, C]
    bias: bool  # whether the bias moves
    tangent: Tensor | None = None  # z [N, C] of the problem's unlabeled examples, where it is known already

    def dense(self) -> Direction:
        """The same direction as ``V [C, D]`` and ``b [C]``."""
        return Direction(self.residual.T @ self.features, self.residual.sum(0) if self.bias else None)


class Trajectory(NamedTuple):
    """The K inner steps that one outer gradient goes back through: where each was taken, and its direction.

    The derivative of the outer loss is the sum of the derivatives of the steps.
    """

    steps: "tuple[tuple[Problem, AnyDirection], ...]"


Dense: TypeAlias = Direction | Vector
AnyDirection: TypeAlias = Dense | Factors


def of_last_layer(direction: AnyDirection) -> Direction:
    """Itself, with factors multiplied out.

    Raises:
        TypeError: it is a whole model's.
    """
    if isinstance(direction, Mapping):
        raise TypeError("direction must be a last layer's Direction or Factors, got a whole model's dict")
    return direction.dense()


def of_model(direction: AnyDirection) -> Vector:
    """Itself.

    Raises:
        TypeError: it is a last layer's.
    """
    if not isinstance(direction, dict):
        raise TypeError(f"direction must be a whole model's dict by parameter name, got {type(direction).__name__}")
    return direction


def steps_of(problem: "Problem", direction: AnyDirection | Trajectory) -> "tuple[tuple[Problem, AnyDirection], ...]":
    """The steps of a trajectory; one direction is one step, from this problem."""
    return direction.steps if isinstance(direction, Trajectory) else ((problem, direction),)


def single(direction: AnyDirection | Trajectory, instead: str = "") -> AnyDirection:
    """The direction itself.

    Raises:
        TypeError: it is a trajectory, the directions of several inner steps; ``instead`` says what to use.
    """
    if isinstance(direction, Trajectory):
        raise TypeError(f"of must give one direction, got those of several inner steps{instead}")
    return direction
