"""Landmarks that move with the picture (Learning to Impute, appendix A.1)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fastmeta.ssl.base import Algorithm, Refiner, StepLoss, TrainingBatch, features_for, frozen_statistics, refine
from fastmeta.ssl.labels import Ramp, ramp_up
from fastmeta.ssl.passes import Statistics, forward_parts


@dataclass(frozen=True)
class TranslationConsistency(Algorithm):
    """What is found in a shifted picture, moved back by the shift, is the label of the picture.

    ``mean (f(x_l) - y_l)^2 + ramp(t) * weight * mean_i,k (f(x'_i) - z_i)_k^2``, ``z_i = teacher(x_i) + d_i``, with
    means over images and coordinates; x and x' are two shifts of one image and d is what the second adds to its
    coordinates. For images with landmarks alone.

    Args:
        weight: of the unlabeled loss after the ramp; 0: labeled images alone. The journal has 3, the workshop 1, the
            code 75.
        ramp: fraction of training over which that weight rises.
        ramp_shape: sigmoid or linear.
        imputer: the averaged model (teacher: the papers' mean teacher) or the model itself (student: pseudo-labels).
        statistics: of the student's batch normalization, see :func:`fastmeta.ssl.passes.forward_parts`.
    """

    weight: float = 3.0
    ramp: float = 0.4
    ramp_shape: Ramp = "linear"
    imputer: Literal["teacher", "student"] = "teacher"
    statistics: Statistics = "joined"

    task: ClassVar[Literal["classification", "landmarks"]] = "landmarks"
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
        """See :class:`fastmeta.ssl.Algorithm`. A method takes the student's derivative on the picture that learns."""
        assert batch.second is not None
        if batch.moved is None:
            raise ValueError("base must not be translation-consistency without landmarks, got images with classes")
        guesser = teacher if self.imputer == "teacher" else model
        guesser.train()  # batch statistics for teacher and student alike
        with torch.no_grad(), frozen_statistics(guesser):
            imputed = guesser(batch.weak) + batch.moved
        with features_for(refiner, model) as tape:
            labeled_outputs, outputs = forward_parts(model, [batch.labeled, batch.second], self.statistics)
        used = refine(
            refiner,
            tape,
            model,
            batch,
            imputed=imputed + (outputs - outputs.detach()),  # the imputer's value, the student's derivative
            views={"imputed": outputs, "learned": outputs},
            inputs={"imputed": batch.second, "learned": batch.second},
            labeled_logits=labeled_outputs,
        )
        labeled = batch.labeled_share * _mean_square(labeled_outputs, batch.targets).mean()
        unlabeled = batch.unlabeled_share * (used.weights * _mean_square(outputs, used.labels)).mean()
        total = labeled + self.weight * ramp_up(progress, self.ramp, self.ramp_shape) * unlabeled + used.loss
        return StepLoss(total, labeled.detach(), unlabeled.detach(), imputed, used)


def _mean_square(outputs: Tensor, targets: Tensor) -> Tensor:
    """``[N]``."""
    return (outputs - targets).square().mean(dim=1)
