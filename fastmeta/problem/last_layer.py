"""The problem of one step where only the last layer moves, in closed form; see :mod:`fastmeta.problem`."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fastmeta import checks, losses, ops
from fastmeta.ops.process_group import Group, sum_over
from fastmeta.problem import vectors
from fastmeta.problem.base import Curvature, How, InnerLoss, Part, ProblemBase, Reduction
from fastmeta.problem.direction import AnyDirection, Direction, Factors, of_last_layer
from fastmeta.problem.targets import kept


class Rows(NamedTuple):
    """A batch at the last layer."""

    features: Tensor  # [N, D]
    logits: Tensor  # [N, C]


@dataclass(frozen=True)
class LastLayerProblem(ProblemBase):
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
        labels_are_predictions: whether the labels are what these very logits predict: every example's loss then has no
            gradient, and a derivative of it would be rounding noise.
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
    labels_are_predictions: bool = False

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.labels.device

    @property
    def logits(self) -> Tensor:
        """Unlabeled logits ``[N, C]``."""
        return self.unlabeled.logits

    @property
    def last_layer(self) -> "LastLayerProblem":
        """Itself: solvers use the rows of features to solve with the Hessian in closed form."""
        return self

    def by(self, how: How, radius: float) -> "LastLayerProblem":
        """Itself: ``how`` is for a whole model; the last layer has one closed form."""
        return self

    def restricted(self, layers: Sequence[str]) -> "LastLayerProblem":
        """Raises ValueError: the last layer alone moves."""
        raise ValueError(f"layers must be None where only the last layer moves, got {layers}")

    def gradient(self, part: Part, *, loss: str, reduction: Reduction = "mean", bias: bool = True) -> Direction:
        """Gradient of the loss of the hold-out examples, of C^U (``unlabeled``) or of C^T (``labeled``).

        ``bias=False`` leaves the layer's bias out of the direction.
        """
        rows, targets, weights, count = self._part(part, loss)
        scaled = self.scaled_weights(rows, weights, count, reduction)
        weight, grad_bias = ops.last_layer_gradient(rows.features, rows.logits, targets, scaled, loss=loss)
        return self._joined(Direction(weight, grad_bias if bias and self.has_bias else None))

    def gradient_in_factors(self, part: Part, *, loss: str, reduction: Reduction, bias: bool) -> Factors:
        """:meth:`gradient`, not multiplied out."""
        if self.process_group is not None:
            return _factors(self.gradient(part, loss=loss, reduction=reduction, bias=bias))
        rows, targets, weights, count = self._part(part, loss)
        targets = losses.as_probabilities(targets, rows.logits.shape[1], rows.logits.dtype)
        residual = losses.residual(rows.logits, targets, loss)
        residual = residual if weights is None else residual * weights.unsqueeze(-1)
        scale = self.mean_scale(count) if reduction == "mean" else 1.0
        return Factors(rows.features, residual * scale, bias and self.has_bias)

    def label_tangent(
        self, direction: AnyDirection, *, loss: str, rate: float = 1.0, reduction: Reduction = "sum"
    ) -> Tensor:
        """``(rate / B) T_i(v)``, ``T = D_v(-dl/dz)`` (``B = 1`` for a sum). ``[N, C]``."""
        v, (features, logits) = of_last_layer(direction), self.unlabeled
        scale = self.step_scale(rate, reduction, len(logits))
        # An operator takes the scale as a number.
        if isinstance(scale, Tensor):
            return ops.label_gradient(features, logits, *v, loss=loss, targets=self.labels) * scale
        return ops.label_gradient(features, logits, *v, loss=loss, scale=scale, targets=self.labels)

    def loss_tangent(self, direction: AnyDirection, *, loss: str) -> Tensor:
        """``D_v l_i``. ``[N]``."""
        features, logits = self.unlabeled
        if isinstance(direction, Factors) and direction.tangent is not None:
            return (losses.residual(logits, self.labels, loss) * direction.tangent).sum(-1)
        return ops.per_example_dot(features, logits, self.labels, *of_last_layer(direction), loss=loss)

    def label_and_loss_tangent(self, direction: AnyDirection, *, loss: str) -> tuple[Tensor, Tensor]:
        """:meth:`label_tangent` ``[N, C]`` and :meth:`loss_tangent` ``[N]``."""
        v = of_last_layer(direction)
        return self.label_tangent(v, loss=loss), self.loss_tangent(v, loss=loss)

    def probes(self, direction: AnyDirection, radius: float) -> tuple[Tensor, Tensor, Tensor]:
        """Logits ``[N, C]`` at ``theta + epsilon v`` and at ``theta - epsilon v``, and epsilon ``= radius / ||v||``.

        The layer is linear in its parameters, so the logits are ``f +- epsilon z``.
        """
        v, logits = of_last_layer(direction), self.unlabeled.logits
        z = self._logit_tangent(v)
        epsilon = radius / vectors.norm(v)
        return logits + epsilon * z, logits - epsilon * z, epsilon

    def feature_similarity(self, direction: AnyDirection, *, bias: bool, rate: float, reduction: Reduction) -> Tensor:
        """``(rate / B) sum_h (h_u^T h_h) r_h`` for a direction in factors. ``[N, C]``.

        Raises:
            TypeError: it is not in factors.
        """
        if not isinstance(direction, Factors):
            raise TypeError("direction must be Factors, from HoldoutGradient(factored=True), got Direction")
        factors = self.unlabeled.features, direction.features, direction.residual
        bias = bias and direction.bias
        scale = self.step_scale(rate, reduction, len(self.labels))
        if isinstance(scale, Tensor):
            return ops.feature_similarity(*factors, bias=bias) * scale
        return ops.feature_similarity(*factors, scale=scale, bias=bias)

    def _logit_tangent(self, v: Direction) -> Tensor:
        """``h V^T + b`` of the unlabeled examples. ``[N, C]``."""
        z = self.unlabeled.features @ v.weight.T
        return z if v.bias is None else z + v.bias

    def moved(self, direction: AnyDirection, rate: float) -> "LastLayerProblem":
        """The same problem at ``theta - rate v``: the features stay and the logits become ``f - rate (h V^T + b)``."""
        step = of_last_layer(direction)

        def move(rows: Rows) -> Rows:
            return Rows(rows.features, rows.logits - rate * functional.linear(rows.features, *step))

        return dataclasses.replace(
            self,
            unlabeled=move(self.unlabeled),
            holdout=move(self.holdout),
            labeled=None if self.labeled is None else move(self.labeled),
            labels_are_predictions=False,
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

        The weights include the reduction, the summand's factor and the loss's ``curvature_scale``.
        """
        found = []
        for part, loss, factor in inner.terms():
            rows, targets, weights, count = self._part(part, loss)
            scaled = self.scaled_weights(rows, weights, count, inner.reduction)
            scaled = rows.logits.new_ones(len(rows.logits)) if scaled is None else scaled
            targets = losses.as_probabilities(targets, rows.logits.shape[1], rows.logits.dtype)
            scale = losses.of(loss).curvature_scale(targets)
            scaled = scaled if scale is None else scaled * scale
            found.append((rows, targets, scaled if factor == 1 else factor * scaled, loss))
        return found

    def scaled_weights(
        self, rows: Rows, weights: Tensor | None, count: int | Tensor, reduction: Reduction
    ) -> Tensor | None:
        """Weights that make ``sum_i w_i l_i`` the loss reduced over ``count``: ``w / N``; None means 1. ``[N]``."""
        if reduction == "sum":
            return weights
        scale = self.mean_scale(count)
        ones = rows.logits.new_ones(len(rows.features)) if weights is None else weights
        return ones * scale

    def _part(self, part: Part, loss: str) -> tuple[Rows, Tensor, Tensor | None, int | Tensor]:
        """Rows, targets, weights and number of the examples of a summand whose loss this is."""
        if part == "unlabeled":
            return self.unlabeled, self.labels, self.inner_weights, len(self.labels)
        rows, targets, name = self.holdout, self.targets, "targets"
        if part == "labeled" and self.labeled is not None and self.labeled_targets is not None:
            rows, targets, name = self.labeled, self.labeled_targets, "labeled_targets"
        checks.classes_of(targets, rows.logits.shape[1], losses.of(loss), name)
        return rows, *kept(targets, rows.logits.dtype)

    def _joined(self, direction: Direction) -> Direction:
        if self.process_group is None:
            return direction
        summed = sum_over([tensor for tensor in direction if tensor is not None], self.process_group)
        return Direction(summed[0], None if direction.bias is None else summed[1])


def _factors(direction: Direction) -> Factors:
    """A dense direction as factors with C + 1 rows, in place of the rows of examples that are on several processes.

    ``V = R^T h`` with R = s I and h = V / s; a last row with h = 0 makes the column sums of R the bias. The scale s is
    large enough that V / s does not overflow, and no larger, so that ``s + (b - s)`` is b.
    """
    weight, bias = direction
    identity = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    if bias is None:
        return Factors(weight, identity, False)
    scale = torch.stack([weight.abs().amax(), bias.abs().amax()]).amax().clamp_min(torch.finfo(weight.dtype).tiny)
    features = torch.cat([weight / scale, torch.zeros_like(weight[:1])])
    return Factors(features, torch.cat([scale * identity, (bias - scale).unsqueeze(0)]), True)
