"""FixMatch (Sohn et al., 2020)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from fastmeta.ssl.alignment import DistributionAlignment, aligned, alignment_for
from fastmeta.ssl.base import Algorithm, Refiner, StepLoss, TrainingBatch
from fastmeta.ssl.labels import harden
from fastmeta.ssl.passes import Statistics
from fastmeta.ssl.weak_to_strong import weak_to_strong


@dataclass(frozen=True)
class FixMatch(Algorithm):
    """Confident predictions on a weak view are the hard labels of a strong view.

    ``CE(f(x_l), y_l) + weight * mean_i [max q_i >= threshold] CE(f(strong_i), argmax q_i)``, ``q = softmax f(weak)``
    without gradient (Eq. (3) and (4)), or ``q`` aligned. A method refines ``q`` before it is made hard.

    Args:
        threshold: confidence below which an image is left out of the step.
        weight: of the unlabeled loss.
        distribution_alignment: see :class:`fastmeta.ssl.Alignment`.
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
        step = weak_to_strong(
            model,
            batch,
            refiner,
            self.statistics,
            impute=lambda predictions: aligned(self.distribution_alignment, memory, predictions, batch),
            finish=self.finish,
        )
        return step.loss(step.supervised(batch), self.weight, batch)
