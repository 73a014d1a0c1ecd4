"""The inner and outer problem of one step: what directions and derivatives are computed from.

With ``m`` the mask, ``w`` the example weights, ``z`` the imputed labels and B the number of unlabeled examples::

    inner   C^U(theta) = (1/B) sum_i m_i w_i l(f_i, z_i)      (a sum in place of the mean where a class says so)
    outer   C^H(theta) = (1/B_h) sum_j l_h(f_j, y_j)

:class:`Problem` is that problem where only the last layer moves, in closed form;
:class:`fastmeta.model_problem.ModelProblem` has the same interface where the whole model moves. Over the processes of a
group the means are those of the joined batch.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from fastmeta import losses, ops
from fastmeta.process_group import Group, joined_count, sum_over

Reduction = Literal["mean", "sum"]
Curvature = Literal["hessian", "gauss_newton"]
Part = Literal["unlabeled", "holdout", "labeled"]


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


class RowFactors(Factors):
    """Factors whose logit tangents of the problem's unlabeled rows are known already: nothing has to be multiplied."""

    tangent: Tensor | None = None  # z [N, C]


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


Dense: TypeAlias = Direction | dict[str, Tensor]
AnyDirection: TypeAlias = Dense | Factors


def of_last_layer(direction: AnyDirection) -> Direction:
    """Itself, with factors multiplied out.

    Raises:
        TypeError: it is a whole model's.
    """
    if isinstance(direction, dict):
        raise TypeError("direction must be a last layer's Direction or Factors, got a whole model's dict")
    return direction.dense()


@dataclass(frozen=True)
class Problem:
    """One step at the last layer. All tensors are detached, of one floating dtype and on one device.

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
        process_group: the processes that the batch is spread over; None: this one alone.
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
    process_group: Group = None

    @property
    def inner_weights(self) -> Tensor | None:
        """``m_i w_i``, ``[N]``; None means 1."""
        return product_of(self.weights, self.mask)

    def labeled_rows(self) -> tuple[Rows, Tensor]:
        """The labeled examples of the inner loss and their targets."""
        if self.labeled is None or self.labeled_targets is None:
            return self.holdout, self.targets
        return self.labeled, self.labeled_targets

    def gradient(self, part: Part, *, loss: str, reduction: Reduction = "mean", bias: bool = True) -> Direction:
        """Gradient of the loss of the hold-out examples, of C^U (``unlabeled``) or of C^T (``labeled``)."""
        rows, targets, weights = self._part(part)
        scaled = self.scaled_weights(rows, weights, reduction)
        weight, grad_bias = ops.last_layer_gradient(rows.features, rows.logits, targets, scaled, loss=loss)
        return self._joined(Direction(weight, grad_bias if bias and self.has_bias else None))

    def moved(self, direction: AnyDirection, rate: float) -> "Problem":
        """The same problem at ``theta - rate v``: the features stay and the logits become ``f - rate (h V^T + b)``."""
        step = of_last_layer(direction)

        def move(rows: Rows) -> Rows:
            return Rows(rows.features, rows.logits - rate * functional.linear(rows.features, *step))

        return dataclasses.replace(
            self,
            unlabeled=move(self.unlabeled),
            holdout=move(self.holdout),
            labeled=None if self.labeled is None else move(self.labeled),
        )

    def hessian_vector_product(self, inner: InnerLoss, direction: AnyDirection) -> Direction:
        """One product with the Hessian of the inner loss at theta."""
        return self.hessian(inner)(direction)

    def hessian(self, inner: InnerLoss, curvature: Curvature = "hessian") -> Callable[[AnyDirection], Direction]:
        """The product with the Hessian of the inner loss at theta, or with its Gauss-Newton matrix."""
        parts = self.inner_rows(inner)
        exact = curvature == "hessian"

        def product(direction: AnyDirection) -> Direction:
            v = of_last_layer(direction)
            weight, bias = torch.zeros_like(v.weight), None if v.bias is None else torch.zeros_like(v.bias)
            for rows, targets, weights, loss in parts:
                if losses.of(loss).exact or not exact:
                    dw, db = ops.hessian_vector_product(
                        rows.features, rows.logits, *v, weights, loss=loss, targets=targets
                    )
                else:
                    z = functional.linear(rows.features, *v)
                    tangent = losses.residual_tangent(rows.logits, targets, z, loss) * weights.unsqueeze(-1)
                    dw, db = tangent.T @ rows.features, tangent.sum(0)
                weight, bias = weight + dw, None if bias is None or db is None else bias + db
            return self._joined(Direction(weight, bias))

        return product

    def inner_rows(self, inner: InnerLoss) -> list[tuple[Rows, Tensor, Tensor, str]]:
        """Rows, targets ``[N, C]``, weights ``[N]`` and loss of every summand of the inner loss's second derivative.

        The weights are those of its sum over the rows, with what the targets scale the curvature by.
        """
        found = []
        for part, loss, factor in inner.terms():
            rows, targets, weights = self._part(part)
            scaled = self.scaled_weights(rows, weights, inner.reduction)
            scaled = rows.logits.new_ones(len(rows.logits)) if scaled is None else scaled
            targets = losses.as_probabilities(targets, rows.logits.shape[1], rows.logits.dtype)
            scale = losses.of(loss).curvature_scale(targets)
            scaled = scaled if scale is None else scaled * scale
            found.append((rows, targets, scaled if factor == 1 else factor * scaled, loss))
        return found

    def scaled_weights(self, rows: Rows, weights: Tensor | None, reduction: Reduction) -> Tensor | None:
        """Weights that make ``sum_i w_i l_i`` the reduced loss: ``w / N`` for a mean; None means 1. ``[N]``."""
        if reduction == "sum":
            return weights
        scale = self.mean_scale(len(rows.features))
        ones = rows.logits.new_ones(len(rows.features)) if weights is None else weights
        return ones * scale

    def mean_scale(self, count: int) -> float | Tensor:
        """``1 / N`` for this process's ``count`` of the N examples of the joined batch."""
        return one_over(count, self.process_group, self.labels.device)

    def _part(self, part: Part) -> tuple[Rows, Tensor, Tensor | None]:
        if part == "unlabeled":
            return self.unlabeled, self.labels, self.inner_weights
        return (self.holdout, self.targets, None) if part == "holdout" else (*self.labeled_rows(), None)

    def _joined(self, direction: Direction) -> Direction:
        if self.process_group is None:
            return direction
        summed = sum_over([tensor for tensor in direction if tensor is not None], self.process_group)
        return Direction(summed[0], None if direction.bias is None else summed[1])


class Refined(NamedTuple):
    """What a method gives back to the training loop."""

    labels: Tensor  # [N, C], detached
    weights: Tensor  # [N], detached
    loss: Tensor  # scalar, to be added to the loss of the step


def product_of(weights: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """``m_i w_i``, ``[N]``; None means 1."""
    if weights is None or mask is None:
        return weights if mask is None else mask
    return weights * mask


def one_over(count: int, group: Group, device: torch.device) -> float | Tensor:
    """``1 / N``, N the number of examples over all processes; 1 where there are none."""
    total = joined_count(count, group, device)
    return 1 / total.clamp_min(1).double() if isinstance(total, Tensor) else 1 / max(total, 1)
