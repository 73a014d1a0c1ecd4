"""FixMatch (Sohn et al., 2020)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional

from fastmeta.ssl.base import Refiner, StepLoss, TrainingBatch, features_for, refine


@dataclass(frozen=True)
class FixMatch:
    """Confident predictions on a weak view are the hard labels of a strong view.

    ``CE(f(x_l), y_l) + weight * mean_i [max q_i >= threshold] CE(f(strong_i), argmax q_i)``, ``q = softmax f(weak)``
    without gradient (Eq. (3) and (4)). A method refines ``q`` before it is made hard.

    Args:
        threshold: confidence below which an image is left out of the step.
        weight: of the unlabeled loss.
    """

    threshold: float = 0.95
    weight: float = 1.0

    imputes: ClassVar[bool] = True
    second_view: ClassVar[Literal["weak", "strong"] | None] = "strong"

    def loss(
        self,
        model: nn.Module,
        batch: TrainingBatch,
        *,
        teacher: nn.Module,
        progress: float,
        refiner: Refiner | None = None,
    ) -> StepLoss:
        """One forward of all three parts, as the published code does; see :class:`fastmeta.ssl.Algorithm`."""
        assert batch.second is not None
        sizes = [len(batch.labeled), len(batch.weak), len(batch.second)]
        with features_for(refiner, model) as tape:
            logits = model(torch.cat([batch.labeled, batch.weak, batch.second]))
        labeled_logits, weak_logits, strong_logits = logits.split(sizes)
        used = refine(
            refiner,
            tape,
            model,
            batch,
            imputed=weak_logits.softmax(dim=1),
            views={"imputed": weak_logits, "learned": strong_logits},
            inputs={"imputed": batch.weak, "learned": batch.second},
            labeled_logits=labeled_logits,
            threshold=self.threshold,
        )
        per_example = functional.cross_entropy(strong_logits, used.labels, reduction="none")

        labeled = batch.labeled_share * functional.cross_entropy(labeled_logits, batch.targets)
        unlabeled = batch.unlabeled_share * (used.weights * per_example).mean()
        total = labeled + self.weight * unlabeled + used.loss
        return StepLoss(total, labeled.detach(), unlabeled.detach(), weak_logits.detach().softmax(dim=1), used)
