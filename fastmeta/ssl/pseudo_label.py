"""Pseudo-label (Lee, 2013)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional

from fastmeta.ssl.base import Algorithm, Refiner, StepLoss, TrainingBatch, features_for, refine
from fastmeta.ssl.labels import Ramp, as_they_are, harden, ramp_up
from fastmeta.ssl.passes import Statistics, forward_parts


@dataclass(frozen=True)
class PseudoLabel(Algorithm):
    """The model's own confident predictions are hard labels for the same view.

    ``CE(f(x_l), y_l) + ramp(t) * weight * mean_i [max q_i >= threshold] CE(f(x_i), argmax q_i)``,
    ``q = softmax f(x_i)`` without gradient.

    Args:
        threshold: confidence below which an image is left out of the step.
        soft: labels stay as they are and every image counts, for a method whose labels are soft: Label Gradient
            Alignment, Algorithm 1, is this loss on the labels of its table.
        weight: of the unlabeled loss after the ramp.
        ramp: fraction of training over which that weight rises.
        ramp_shape: sigmoid or linear.
        statistics: of batch normalization, see :func:`fastmeta.ssl.passes.forward_parts`; MixMatch's repository:
            separate.
    """

    threshold: float = 0.95
    weight: float = 1.0
    ramp: float = 0.4
    ramp_shape: Ramp = "sigmoid"
    soft: bool = False
    statistics: Statistics = "joined"

    imputes: ClassVar[bool] = True
    second_view: ClassVar[Literal["weak", "strong"] | None] = None

    def finish(self, labels: Tensor, memory: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """Hard labels, and which are confident; unless they are to stay soft."""
        return as_they_are(labels) if self.soft else harden(labels, self.threshold)

    def loss(
        self,
        model: nn.Module,
        batch: TrainingBatch,
        *,
        teacher: nn.Module,
        progress: float,
        refiner: Refiner | None = None,
        memory: nn.Module | None = None,
    ) -> StepLoss:
        """See :class:`fastmeta.ssl.Algorithm`."""
        with features_for(refiner, model) as tape:
            labeled_logits, logits_u = forward_parts(model, [batch.labeled, batch.weak], self.statistics)
        used = refine(
            refiner,
            tape,
            model,
            batch,
            imputed=logits_u.softmax(dim=1),
            views={"imputed": logits_u, "learned": logits_u},
            inputs={"imputed": batch.weak, "learned": batch.weak},
            labeled_logits=labeled_logits,
            finish=self.finish,
        )
        per_example = functional.cross_entropy(logits_u, used.labels, reduction="none")

        labeled = batch.labeled_share * functional.cross_entropy(labeled_logits, batch.targets)
        unlabeled = batch.unlabeled_share * (used.weights * per_example).mean()
        weight = self.weight * ramp_up(progress, self.ramp, self.ramp_shape)
        total = labeled + weight * unlabeled + used.loss
        return StepLoss(total, labeled.detach(), unlabeled.detach(), logits_u.detach().softmax(dim=1), used)
