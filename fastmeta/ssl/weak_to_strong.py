"""What FixMatch and its successors share: labels from a weak view, learned on a strong view of the same image."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from fastmeta.ssl.base import Finish, Refiner, StepLoss, TrainingBatch, Used, features_for, refine
from fastmeta.ssl.passes import Statistics, forward_parts


@dataclass(frozen=True)
class WeakToStrong:
    """A forward of the three parts of a batch, and the labels of the unlabeled ones.

    Args:
        labeled_logits: ``[B_l, C]``.
        strong_logits: ``[B_u, C]``.
        imputed: probabilities on the weak view ``[B_u, C]``; on the graph.
        used: what is learned.
    """

    labeled_logits: Tensor
    strong_logits: Tensor
    imputed: Tensor
    used: Used

    def supervised(self, batch: TrainingBatch) -> Tensor:
        """The mean cross-entropy of the labeled images."""
        return batch.labeled_share * functional.cross_entropy(self.labeled_logits, batch.targets)

    def loss(self, labeled: Tensor, weight: float, batch: TrainingBatch) -> StepLoss:
        """``labeled + weight * mean_i w_i CE(f(strong_i), labels_i)`` and a method's loss, if it has one."""
        per_example = functional.cross_entropy(self.strong_logits, self.used.labels, reduction="none")
        unlabeled = batch.unlabeled_share * (self.used.weights * per_example).mean()
        total = labeled + weight * unlabeled + self.used.loss
        return StepLoss(total, labeled.detach(), unlabeled.detach(), self.imputed.detach(), self.used)


def weak_to_strong(
    model: nn.Module,
    batch: TrainingBatch,
    refiner: Refiner | None,
    statistics: Statistics,
    *,
    impute: Callable[[Tensor], Tensor],
    finish: Finish,
) -> WeakToStrong:
    """Forward, impute, refine.

    Args:
        model: in training mode.
        batch: the step's data; its second view is the strong one.
        refiner: None for the base alone.
        statistics: see :func:`fastmeta.ssl.passes.forward_parts`.
        impute: from probabilities on the weak view ``[B_u, C]`` to labels.
        finish: see :func:`fastmeta.ssl.base.refine`.
    """
    assert batch.second is not None
    with features_for(refiner, model) as tape:
        parts = forward_parts(model, [batch.labeled, batch.weak, batch.second], statistics)
    labeled_logits, weak_logits, strong_logits = parts
    imputed = impute(weak_logits.softmax(dim=1))
    used = refine(
        refiner,
        tape,
        model,
        batch,
        imputed=imputed,
        views={"imputed": weak_logits, "learned": strong_logits},
        inputs={"imputed": batch.weak, "learned": batch.second},
        labeled_logits=labeled_logits,
        finish=finish,
    )
    return WeakToStrong(labeled_logits, strong_logits, imputed, used)
