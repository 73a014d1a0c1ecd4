"""FreeMatch (Wang et al., 2023)."""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fastmeta.ops.process_group import Group, sum_over, world_size
from fastmeta.ssl.base import Algorithm, Refiner, StepLoss, TrainingBatch, joined_mean, remembered
from fastmeta.ssl.labels import harden
from fastmeta.ssl.passes import Statistics
from fastmeta.ssl.weak_to_strong import weak_to_strong
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
        kept = remembered(memory, Thresholds)

        def impute(predictions: Tensor) -> Tensor:
            kept.update(predictions, batch)  # before thresholds are asked for
            return predictions

        finish = partial(self.finish, memory=memory)
        step = weak_to_strong(model, batch, refiner, self.statistics, impute=impute, finish=finish)
        found = step.loss(step.supervised(batch), self.weight, batch)
        if not self.fairness:
            return found
        strong = step.strong_logits.softmax(dim=1)
        fairness = kept.fairness(strong, step.used.mask, batch.process_group)
        return replace(found, total=found.total + self.fairness * fairness)


class Thresholds(Stateful):
    """FreeMatch's running averages, and what it makes of them.

    Before the first step they are uniform, as in the paper.

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
        of the largest. A class that is nobody's largest has no part; without any example it is 0. By the definition, a
        class that is nobody's largest for thousands of steps takes all the weight (its average in ``h`` goes to 0), and
        the loss with its gradient to 0.

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
