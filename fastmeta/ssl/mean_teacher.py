"""Mean teacher (Tarvainen and Valpola, 2017)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional

from fastmeta.ssl.base import Algorithm, Refiner, StepLoss, TrainingBatch, features_for, frozen_statistics, refine
from fastmeta.ssl.labels import Ramp, ramp_up
from fastmeta.ssl.passes import Statistics, forward_parts


@dataclass(frozen=True)
class MeanTeacher(Algorithm):
    """The averaged model's predictions are soft labels for another weak view.

    ``CE(f(x_l), y_l) + ramp(t) * weight * mean_i sum_c (softmax f(x'_i) - q_i)_c^2``, ``q = softmax teacher(x_i)``.
    Every example counts, however unsure: the threshold of the hard-label algorithms has no place here.

    Args:
        weight: of the unlabeled loss after the ramp.
        ramp: fraction of training over which that weight rises.
        ramp_shape: sigmoid or linear.
        statistics: of the student's batch normalization, see :func:`fastmeta.ssl.passes.forward_parts`; MixMatch's
            repository: separate, Learning to Impute: interleaved. The teacher's are those of its own batch.
    """

    weight: float = 5.0
    ramp: float = 0.4
    ramp_shape: Ramp = "sigmoid"
    statistics: Statistics = "joined"

    imputes: ClassVar[bool] = True
    second_view: ClassVar[Literal["weak", "strong"] | None] = "weak"

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
        """See :class:`fastmeta.ssl.Algorithm`. A method takes the student's derivative and the teacher's labels."""
        assert batch.second is not None
        teacher.train()  # batch statistics for teacher and student alike
        with torch.no_grad(), frozen_statistics(teacher):
            imputed = teacher(batch.weak).softmax(dim=1)
        with features_for(refiner, model) as tape:
            labeled_logits, student_logits = forward_parts(model, [batch.labeled, batch.second], self.statistics)
        probabilities = student_logits.softmax(dim=1)
        used = refine(
            refiner,
            tape,
            model,
            batch,
            imputed=imputed + (probabilities - probabilities.detach()),  # the teacher's value, the student's derivative
            views={"imputed": student_logits, "learned": student_logits},
            inputs={"imputed": batch.second, "learned": batch.second},
            labeled_logits=labeled_logits,
        )
        per_example = (probabilities - used.labels).square().sum(dim=1)

        labeled = batch.labeled_share * functional.cross_entropy(labeled_logits, batch.targets)
        unlabeled = batch.unlabeled_share * (used.weights * per_example).mean()
        weight = self.weight * ramp_up(progress, self.ramp, self.ramp_shape)
        total = labeled + weight * unlabeled + used.loss
        return StepLoss(total, labeled.detach(), unlabeled.detach(), imputed, used)
