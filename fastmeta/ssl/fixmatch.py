"""FixMatch (Sohn et al., 2020)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional

from fastmeta.ssl.alignment import DistributionAlignment, aligned, alignment_for
from fastmeta.ssl.base import Algorithm, Refiner, StepLoss, TrainingBatch, features_for, refine
from fastmeta.ssl.labels import harden
from fastmeta.ssl.passes import Statistics, forward_parts


@dataclass(frozen=True)
class FixMatch(Algorithm):
    """Confident predictions on a weak view are the hard labels of a strong view.

    ``CE(f(x_l), y_l) + weight * mean_i [max q_i >= threshold] CE(f(strong_i), argmax q_i)``, ``q = softmax f(weak)``
    without gradient (Eq. (3) and (4)), or ``q`` aligned. A method refines ``q`` before it is made hard.

    Args:
        threshold: confidence below which an image is left out of the step.
        weight: of the unlabeled loss.
        distribution_alignment: see :class:`fastmeta.ssl.Alignment`; uniform is the paper's FixMatch with alignment.
        statistics: of batch normalization, see :func:`fastmeta.ssl.passes.forward_parts`; published: joined.
    """

    threshold: float = 0.95
    weight: float = 1.0
    distribution_alignment: DistributionAlignment = "none"
    statistics: Statistics = "joined"

    imputes: ClassVar[bool] = True
    second_view: ClassVar[Literal["weak", "strong"] | None] = "strong"

    def memory(self, num_unlabeled: int, num_classes: int, *, model: nn.Module, labels: Tensor) -> nn.Module | None:
        """The running average of distribution alignment, if any."""
        return alignment_for(self.distribution_alignment, labels, num_classes)

    def finish(self, labels: Tensor, memory: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """Hard labels, and which are confident."""
        return harden(labels, self.threshold)

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
        assert batch.second is not None
        with features_for(refiner, model) as tape:
            parts = forward_parts(model, [batch.labeled, batch.weak, batch.second], self.statistics)
        labeled_logits, weak_logits, strong_logits = parts
        imputed = aligned(self.distribution_alignment, memory, weak_logits.softmax(dim=1), batch)
        used = refine(
            refiner,
            tape,
            model,
            batch,
            imputed=imputed,
            views={"imputed": weak_logits, "learned": strong_logits},
            inputs={"imputed": batch.weak, "learned": batch.second},
            labeled_logits=labeled_logits,
            finish=self.finish,
        )
        per_example = functional.cross_entropy(strong_logits, used.labels, reduction="none")

        labeled = batch.labeled_share * functional.cross_entropy(labeled_logits, batch.targets)
        unlabeled = batch.unlabeled_share * (used.weights * per_example).mean()
        total = labeled + self.weight * unlabeled + used.loss
        return StepLoss(total, labeled.detach(), unlabeled.detach(), imputed.detach(), used)
