"""The inner and outer problem of one step at the last layer: what directions and derivatives are computed from.

With ``m`` the mask, ``w`` the example weights, ``z`` the imputed labels and B the number of unlabeled examples::

    inner   C^U(theta) = (1/B) sum_i m_i w_i l(f_i, z_i)      (a sum in place of the mean where a class says so)
    outer   C^H(theta) = (1/B_h) sum_j l_h(f_j, y_j)
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

Reduction = Literal["mean", "sum"]


class Rows(NamedTuple):
    """What a batch looks like from the last layer."""

    features: Tensor  # [N, D]
    logits: Tensor  # [N, C]


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

    def dense(self) -> Direction:
        """The same direction as ``V [C, D]`` and ``b [C]``."""
        return Direction(self.residual.T @ self.features, self.residual.sum(0) if self.bias else None)


@dataclass(frozen=True)
class Problem:
    """One step. All tensors are detached, of one floating dtype and on one device.

    Args:
        unlabeled: the unlabeled examples, in the view that the inner loss is taken on.
        labels: imputed labels ``z [N, C]``.
        holdout: the examples of the outer loss.
        targets: their labels, probabilities ``[Nh, C]`` or int64 classes ``[Nh]``.
        weights: example weights ``w [N]``; None means 1.
        mask: ``m [N]``, 0 for an example that the inner loss leaves out; None means 1.
        labeled: labeled examples of the inner loss (C^T), where a direction uses them; None: the hold-out examples.
        labeled_targets: their labels.
        has_bias: whether the layer has a bias.
    """

    unlabeled: Rows
    labels: Tensor
    holdout: Rows
    targets: Tensor
    weights: Tensor | None = None
    mask: Tensor | None = None
    labeled: Rows | None = None
    labeled_targets: Tensor | None = None
    has_bias: bool = True

    @property
    def inner_weights(self) -> Tensor | None:
        """``m_i w_i``, ``[N]``; None means 1."""
        if self.weights is None or self.mask is None:
            return self.weights if self.mask is None else self.mask
        return self.weights * self.mask

    def labeled_rows(self) -> tuple[Rows, Tensor]:
        """The labeled examples of the inner loss and their targets."""
        if self.labeled is None or self.labeled_targets is None:
            return self.holdout, self.targets
        return self.labeled, self.labeled_targets


class Refined(NamedTuple):
    """What a method gives back to the training loop."""

    labels: Tensor  # [N, C], detached
    weights: Tensor  # [N], detached
    loss: Tensor  # scalar, to be added to the loss of the step


def example_weights(count: int, weights: Tensor | None, reduction: Reduction, like: Tensor) -> Tensor | None:
    """Weights that make ``sum_i w_i l_i`` the reduced loss: ``w / count`` for a mean; None means 1. ``[count]``."""
    if reduction == "sum":
        return weights
    scale = 1 / max(count, 1)
    return like.new_full((count,), scale) if weights is None else weights * scale
