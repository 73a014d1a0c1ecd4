"""Unsupervised data augmentation (Xie et al., 2020)."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional

from fastmeta.ops.process_group import sum_over, world_size
from fastmeta.ssl.alignment import DistributionAlignment, aligned, alignment_for
from fastmeta.ssl.base import Algorithm, Refiner, StepLoss, TrainingBatch
from fastmeta.ssl.labels import harden, sharpen
from fastmeta.ssl.passes import Statistics
from fastmeta.ssl.weak_to_strong import WeakToStrong, weak_to_strong

Annealing = Literal["none", "linear", "log", "exp"]


@dataclass(frozen=True)
class UDA(Algorithm):
    """Confident, sharpened predictions on a weak view are the soft labels of a strong view.

    ``L_l + weight * mean_i [max q_i >= threshold] CE(f(strong_i), sharpen(q_i, temperature))``, ``q = softmax f(weak)``
    without gradient. ``L_l`` is the mean cross-entropy of the labeled images, with training signal annealing of those
    alone whose label has a probability of at most :func:`annealed_threshold`. A method refines q before the mask is
    taken and it is sharpened.

    Args:
        threshold: confidence below which an image is left out of the step.
        temperature: the lower, the closer to hard labels.
        weight: of the unlabeled loss.
        annealing: none, or the schedule of training signal annealing.
        distribution_alignment: see :class:`fastmeta.ssl.Alignment`.
        statistics: of batch normalization, see :func:`fastmeta.ssl.passes.forward_parts`; published: joined.
    """

    threshold: float = 0.8
    temperature: float = 0.4
    weight: float = 1.0
    annealing: Annealing = "none"
    distribution_alignment: DistributionAlignment = "none"
    statistics: Statistics = "joined"

    imputes: ClassVar[bool] = True
    second_view: ClassVar[Literal["weak", "strong"] | None] = "strong"

    def memory(self, num_unlabeled: int, num_classes: int, *, model: nn.Module, labels: Tensor) -> nn.Module | None:
        """The running average of distribution alignment, if any."""
        return alignment_for(self.distribution_alignment, labels, num_classes)

    def finish(self, labels: Tensor, memory: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """Sharp labels, and which are confident."""
        return sharpen(labels, self.temperature), harden(labels, self.threshold)[1]

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
        return step.loss(self._labeled(step, batch, progress), self.weight, batch)

    def _labeled(self, step: WeakToStrong, batch: TrainingBatch, progress: float) -> Tensor:
        """Over the images of all processes that annealing leaves, as many as these are."""
        if self.annealing == "none":
            return step.supervised(batch)
        logits = step.labeled_logits
        per_example = functional.cross_entropy(logits, batch.targets, reduction="none")
        threshold = annealed_threshold(self.annealing, progress, logits.shape[1])
        learned = (per_example.detach() >= -math.log(threshold)).to(per_example.dtype)
        (count,) = sum_over([learned.sum()], batch.process_group)
        return world_size(batch.process_group) * (learned * per_example).sum() / count.clamp_min(1)


def annealed_threshold(schedule: Annealing, progress: float, num_classes: int) -> float:
    """``a (1 - 1/C) + 1/C``: the probability of its label from which on a labeled image is not learned (section 2).

    ``a`` is ``t`` (linear), ``1 - exp(-5 t)`` (log) or ``exp(5 (t - 1))`` (exp) at the fraction t of training.

    >>> [round(annealed_threshold(name, 0.5, 10), 3) for name in ("linear", "log", "exp")]
    [0.55, 0.926, 0.174]
    """
    risen = {"none": 1.0, "linear": progress, "log": 1 - math.exp(-5 * progress), "exp": math.exp(5 * (progress - 1))}
    return risen[schedule] * (1 - 1 / num_classes) + 1 / num_classes
