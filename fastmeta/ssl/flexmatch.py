"""FlexMatch (Zhang et al., 2021)."""

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fastmeta.ops.process_group import Group, joined_rows
from fastmeta.ssl.base import Algorithm, Refiner, StepLoss, TrainingBatch, remembered
from fastmeta.ssl.labels import harden
from fastmeta.ssl.passes import Statistics
from fastmeta.ssl.weak_to_strong import weak_to_strong
from fastmeta.state import Stateful

Mapping = Literal["convex", "linear", "concave"]


@dataclass(frozen=True)
class FlexMatch(Algorithm):
    """FixMatch with a threshold for each class that rises as more of the unlabeled images are confidently in it.

    ``CE(f(x_l), y_l) + weight * mean_i [max q_i >= tau(argmax q_i)] CE(f(strong_i), argmax q_i)``, with ``q = softmax
    f(weak)`` without gradient and ``tau`` of :meth:`Curriculum.thresholds` before the step. A method refines q before
    it is made hard; the table of who is confident is from q itself.

    Args:
        threshold: that of a class which is learned best.
        weight: of the unlabeled loss.
        mapping: from how well a class is learned, x, to a share of the threshold: x / (2 - x) (convex, the paper's
            choice), x (linear) or ln(x + 1) / ln 2 (concave).
        warm_up: thresholds rise slowly while most images are in no class yet.
        statistics: of batch normalization, see :func:`fastmeta.ssl.passes.forward_parts`; published: joined.
    """

    threshold: float = 0.95
    weight: float = 1.0
    mapping: Mapping = "convex"
    warm_up: bool = True
    statistics: Statistics = "joined"

    imputes: ClassVar[bool] = True
    second_view: ClassVar[Literal["weak", "strong"] | None] = "strong"

    def memory(self, num_unlabeled: int, num_classes: int, *, model: nn.Module, labels: Tensor) -> nn.Module | None:
        """Each unlabeled image's last confident class."""
        return Curriculum(num_unlabeled, num_classes)

    def finish(self, labels: Tensor, memory: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """Hard labels, and which of them reach the threshold of their class."""
        thresholds = remembered(memory, Curriculum).thresholds(self.threshold, self.mapping, self.warm_up)
        return harden(labels, thresholds)

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
        kept = remembered(memory, Curriculum)
        finish = partial(self.finish, memory=memory)
        step = weak_to_strong(
            model, batch, refiner, self.statistics, impute=lambda predictions: predictions, finish=finish
        )
        kept.update(batch.index, step.imputed, self.threshold, batch.process_group)
        return step.loss(step.supervised(batch), self.weight, batch)


class Curriculum(Stateful):
    """The class that each unlabeled image was last confidently in, ``[M]``, -1 for none yet.

    Args:
        num_unlabeled: M.
        num_classes: C.
    """

    table: Tensor  # [M + 1], int64; the last row is nobody's

    def __init__(self, num_unlabeled: int, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("table", torch.full((num_unlabeled + 1,), -1))
        self.num_classes = num_classes

    @torch.no_grad()
    def update(self, index: Tensor, predictions: Tensor, threshold: float, group: Group = None) -> None:
        """Note the images whose prediction is confident.

        Args:
            index: places ``[N]``; of an image that is there twice the larger class counts.
            predictions: ``[N, C]``.
            threshold: a confidence.
            group: processes whose images go into the one table, which is equal on all of them.
        """
        confidence, place = predictions.max(dim=1)
        row = torch.where(confidence >= threshold, index, len(self.table) - 1)
        (row, place), _ = joined_rows([row, place], group)
        self.table.scatter_reduce_(0, row, place, "amax", include_self=False)

    def thresholds(self, threshold: float, mapping: Mapping, warm_up: bool) -> Tensor:
        """``tau(c) = M(beta_c) threshold``, ``[C]`` (curriculum pseudo labeling).

        ``beta_c`` is the number of images in class c over that of the largest class or, with ``warm_up``, over that of
        the images in no class if there are more of these.
        """
        counts = torch.zeros(self.num_classes + 1, dtype=torch.float64, device=self.table.device)
        ones = torch.ones_like(self.table[:-1], dtype=torch.float64)
        counts.scatter_add_(0, self.table[:-1] + 1, ones)  # those in no class first
        largest = (counts if warm_up else counts[1:]).max()
        learned = counts[1:] / largest.clamp_min(1)
        if mapping == "convex":
            learned = learned / (2 - learned)
        elif mapping == "concave":
            learned = (learned + 1).log() / math.log(2)
        return threshold * learned
