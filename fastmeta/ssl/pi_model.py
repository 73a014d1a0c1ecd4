"""The Pi-model (Laine and Aila, 2017)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn
from torch.nn import functional

from fastmeta.ssl.base import Algorithm, Refiner, StepLoss, TrainingBatch, features_for, refine
from fastmeta.ssl.labels import Ramp, conditional_entropy, ramp_up
from fastmeta.ssl.passes import Statistics, forward_parts


@dataclass(frozen=True)
class PiModel(Algorithm):
    """The model's predictions on two weak views of an image are to be the same.

    ``CE(f(x_l), y_l) + ramp(t) * weight * mean_i (1/C) sum_c (softmax f(x'_i) - q_i)_c^2 + entropy_weight * mean_i
    H(softmax f(x'_i))``, ``q = softmax f(x_i)`` (Algorithm 1). In the paper the mean is over labeled and unlabeled
    images, and both views learn; in later codes (Oliver et al., MixMatch's) it is over the unlabeled images, among
    which the labeled ones may be (``split.labeled_in_unlabeled``), as here, and q is a constant. With a method it is
    always one: its labels are.

    Args:
        weight: of the unlabeled loss after the ramp; published: 20 (MixMatch's repository, SVHN 5).
        ramp: fraction of training over which that weight rises.
        ramp_shape: sigmoid, as in the paper, or linear, as in MixMatch's repository.
        learns: which views have a gradient: ``both``, or the ``second`` alone.
        entropy_weight: of the entropy of the second view's predictions.
        statistics: of batch normalization, see :func:`fastmeta.ssl.passes.forward_parts`; MixMatch's repository:
            separate.
    """

    weight: float = 20.0
    ramp: float = 0.4
    ramp_shape: Ramp = "sigmoid"
    learns: Literal["both", "second"] = "both"
    entropy_weight: float = 0.0
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
        """See :class:`fastmeta.ssl.Algorithm`. ``StepLoss.unlabeled`` is the squared distance alone."""
        assert batch.second is not None
        with features_for(refiner, model) as tape:
            parts = forward_parts(model, [batch.labeled, batch.weak, batch.second], self.statistics)
        labeled_logits, first_logits, second_logits = parts
        first, second = first_logits.softmax(dim=1), second_logits.softmax(dim=1)
        used = refine(
            refiner,
            tape,
            model,
            batch,
            imputed=first,
            views={"imputed": first_logits, "learned": second_logits},
            inputs={"imputed": batch.weak, "learned": batch.second},
            labeled_logits=labeled_logits,
        )
        targets = first if refiner is None and self.learns == "both" else used.labels
        per_example = (second - targets).square().mean(dim=1)

        labeled = batch.labeled_share * functional.cross_entropy(labeled_logits, batch.targets)
        unlabeled = batch.unlabeled_share * (used.weights * per_example).mean()
        weight = self.weight * ramp_up(progress, self.ramp, self.ramp_shape)
        total = labeled + weight * unlabeled + used.loss
        if self.entropy_weight:
            total = total + self.entropy_weight * batch.unlabeled_share * conditional_entropy(second_logits)
        return StepLoss(total, labeled.detach(), unlabeled.detach(), first.detach(), used)
