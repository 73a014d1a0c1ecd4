"""FreeMatch (Wang et al., 2023)."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmeta.ops.process_group import Group, sum_over, world_size
from fastmeta.ssl.base import Algorithm, Refiner, StepLoss, TrainingBatch, features_for, joined_mean, refine, remembered
from fastmeta.ssl.labels import harden
from fastmeta.ssl.passes import Statistics, forward_parts
from fastmeta.state import Stateful


@dataclass(frozen=True)
class FreeMatch(Algorithm):
    """FixMatch with a threshold for each class that rises with the model's confidence, and a loss of fairness.

    ``CE(f(x_l), y_l) + weight * mean_i [max q_i >= tau(argmax q_i)] CE(f(strong_i), argmax q_i) + fairness * L_f``,
    ``q = softmax f(weak)`` without gradient, with ``tau`` of :meth:`Thresholds.thresholds` and ``L_f`` of
    :meth:`Thresholds.fairness`. A method refines q before it is made hard; thresholds are from q itself.

    Args:
        weight: of the unlabeled loss.
        fairness: of the loss of fairness; USB's for CIFAR-10 with 40 labels.
        decay: of the averages behind the thresholds.
        ceiling: of the average confidence; USB on SVHN: 0.95.
        statistics: of batch normalization, see :func:`fastmeta.ssl.passes.forward_parts`; published: joined.
    """

    weight: float = 1.0
    fairness: float = 0.001
    decay: float = 0.999
    ceiling: float = 1.0
    statistics: Statistics = "joined"

    imputes: ClassVar[bool] = True
    second_view: ClassVar[Literal["weak", "strong"] | None] = "strong"

    def memory(self, num_unlabeled: int, num_classes: int, *, model: nn.Module, labels: Tensor) -> nn.Module | None:
        """The averages behind the thresholds."""
        return Thresholds(num_classes, self.decay, self.ceiling)

    def finish(self, labels: Tensor, memory: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """Hard labels, and which of them reach the threshold of their class."""
        return harden(labels, remembered(memory, Thresholds).thresholds())

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
        """See :class:`fastmeta.ssl.Algorithm`. ``StepLoss.unlabeled`` is without the fairness."""
        assert batch.second is not None
        kept = remembered(memory, Thresholds)
        with features_for(refiner, model) as tape:
            parts = forward_parts(model, [batch.labeled, batch.weak, batch.second], self.statistics)
        labeled_logits, weak_logits, strong_logits = parts
        imputed = weak_logits.softmax(dim=1)
        kept.update(imputed, batch)
        used = refine(
            refiner,
            tape,
            model,
            batch,
            imputed=imputed,
            views={"imputed": weak_logits, "learned": strong_logits},
            inputs={"imputed": batch.weak, "learned": batch.second},
            labeled_logits=labeled_logits,
            finish=partial(self.finish, memory=memory),
        )
        per_example = functional.cross_entropy(strong_logits, used.labels, reduction="none")

        labeled = batch.labeled_share * functional.cross_entropy(labeled_logits, batch.targets)
        unlabeled = batch.unlabeled_share * (used.weights * per_example).mean()
        total = labeled + self.weight * unlabeled + used.loss
        if self.fairness:
            total = total + self.fairness * kept.fairness(strong_logits.softmax(dim=1), used.mask, batch.process_group)
        return StepLoss(total, labeled.detach(), unlabeled.detach(), imputed.detach(), used)


class Thresholds(Stateful):
    """FreeMatch's running averages, and what it makes of them.

    Before the first step they are uniform, as in the paper; USB's code starts all of them at 1, so that hardly an image
    is learned in the first thousand steps.

    Args:
        num_classes: C.
        decay: of the averages.
        ceiling: of the confidence.
    """

    confidence: Tensor  # []
    predictions: Tensor  # [C]
    histogram: Tensor  # [C]

    def __init__(self, num_classes: int, decay: float, ceiling: float = 1.0) -> None:
        super().__init__()
        uniform = torch.full((num_classes,), 1 / num_classes, dtype=torch.float64)
        self.register_buffer("confidence", uniform[0].clone())
        self.register_buffer("predictions", uniform.clone())
        self.register_buffer("histogram", uniform.clone())
        self.decay, self.ceiling = decay, ceiling

    @torch.no_grad()
    def update(self, predictions: Tensor, batch: TrainingBatch) -> None:
        """Take in a batch: averages of the largest probability, of all and of the largest's place.

        Args:
            predictions: q ``[B_u, C]``; the means are those of all processes.
            batch: of which they are.
        """
        hard, _ = harden(predictions, 0.0)
        largest = predictions.amax(dim=1, keepdim=True)
        mean = joined_mean(torch.cat([largest, predictions, hard], dim=1), batch.unlabeled_share, batch.process_group)
        classes = len(self.predictions)
        averages = (self.confidence, self.predictions, self.histogram)
        for average, new in zip(averages, (mean[0], *mean[1:].split(classes)), strict=True):
            average.lerp_(new, 1 - self.decay)
        self.confidence.clamp_(max=self.ceiling)

    def thresholds(self) -> Tensor:
        """``tau(c) = confidence * predictions_c / max predictions``, ``[C]`` (self-adaptive thresholds)."""
        return self.confidence * self.predictions / self.predictions.max()

    def fairness(self, predictions: Tensor, mask: Tensor, group: Group = None) -> Tensor:
        r"""How alike the model's classes are on strong views, each per its own frequency (self-adaptive fairness).

        .. math:: L_f = \sum_c a_c \log b_c, \quad a = \mathrm{SumNorm}\big(\tilde p / \tilde h\big), \quad
            b = \mathrm{SumNorm}\big(\bar p / \bar h\big)

        with the averages of :meth:`update` and, of the examples with a mask of 1, the mean prediction and the histogram
        of the largest. A class that is nobody's largest has no part; without any example it is 0.

        Args:
            predictions: of the strong views ``[N, C]``, on the graph.
            mask: ``[N]``.
            group: the processes that have the other examples.
        """
        hard, _ = harden(predictions.detach(), 0.0)
        # No matrix products, which autocast would round.
        own = (mask.unsqueeze(1) * predictions).sum(dim=0)
        mean, counts = sum_over([own, (mask.unsqueeze(1) * hard).sum(dim=0)], group)
        # The value is that of all processes; of the derivative each has its part, and they are averaged.
        mean = mean.detach() + world_size(group) * (own - own.detach())
        present = counts > 0
        ratio = torch.where(present, mean / counts.clamp_min(1), 0)
        ratio = ratio / ratio.sum().clamp_min(torch.finfo(ratio.dtype).tiny)
        weights = self.predictions / self.histogram.clamp_min(torch.finfo(torch.float64).tiny)
        weights = (weights / weights.sum()).to(ratio.dtype)
        return torch.where(present, weights * torch.where(present, ratio, 1).log(), 0).sum()
