"""What both problems share: the inner loss that a step descends, its means over examples, and the options' names."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastmeta import checks
from fastmeta.ops.process_group import Group, joined_count
from fastmeta.problem import vectors
from fastmeta.problem.direction import AnyDirection

Reduction = Literal["mean", "sum"]
Curvature = Literal["hessian", "gauss_newton"]
Part = Literal["unlabeled", "holdout", "labeled"]
How = Literal["double_backward", "jvp", "finite_difference", "forward_difference", "last_layer"]
HOWS: tuple[How, ...] = ("double_backward", "jvp", "finite_difference", "forward_difference", "last_layer")


class InnerLoss(NamedTuple):
    """``C^U + labeled_weight C^T``: what the inner steps descend."""

    loss: str  # of C^U
    reduction: Reduction = "mean"  # of both, over their examples
    labeled_weight: float = 0.0
    labeled_loss: str = "cross_entropy"  # of C^T

    def terms(self) -> list[tuple[Part, str, float]]:
        """Part, loss and factor of every summand."""
        unlabeled: tuple[Part, str, float] = ("unlabeled", self.loss, 1.0)
        if self.labeled_weight == 0:
            return [unlabeled]
        return [unlabeled, ("labeled", self.labeled_loss, self.labeled_weight)]


def check_how(how: object, radius: object) -> None:
    """Raise unless ``how`` is one of :data:`HOWS` and the radius of a difference is > 0."""
    if how not in HOWS:
        raise ValueError(f"how must be one of {', '.join(HOWS)}, got {how!r}")
    if checks.number(radius, "radius") <= 0:
        raise ValueError(f"radius must be > 0, got {radius}")


class ProblemBase:
    """Means over the examples, and their weights."""

    weights: Tensor | None
    mask: Tensor | None
    process_group: Group
    labels_are_predictions: bool

    @property
    def device(self) -> torch.device:
        """The device on which processes add up their numbers of examples."""
        raise NotImplementedError

    @property
    def sharded(self) -> bool:
        """Whether directions are this process's parts of them."""
        return False

    def length(self, direction: AnyDirection) -> Tensor:
        """Euclidean length of a direction; see :func:`fastmeta.problem.vectors.norm`."""
        return vectors.norm(direction)

    @property
    def inner_weights(self) -> Tensor | None:
        """``m_i w_i``, ``[N]``; None means 1."""
        if self.weights is None or self.mask is None:
            return self.weights if self.mask is None else self.mask
        return self.weights * self.mask

    def mean_scale(self, count: int | Tensor) -> float | Tensor:
        """``1 / N`` for this process's ``count`` of the N examples of the joined batch; 1 where there are none."""
        total = joined_count(count, self.process_group, self.device)
        return 1 / total.clamp_min(1).double() if isinstance(total, Tensor) else 1 / max(total, 1)

    def step_scale(self, rate: float, reduction: Reduction, count: int) -> float | Tensor:
        """``rate / B`` for a mean over the B examples of the joined batch, ``rate`` for a sum.

        A scalar tensor where several processes count B on their GPUs, so that no host waits for them.
        """
        return rate * self.mean_scale(count) if reduction == "mean" else rate


def full_precision(logits: Tensor) -> Tensor:
    """float32 in place of half precision, for the losses of a model under autocast."""
    return logits if logits.dtype == torch.float64 else logits.float()
