"""Distribution alignment (Berthelot et al., 2020)."""

from typing import Literal

import torch
from torch import Tensor, nn

from fastmeta.ssl.base import TrainingBatch, joined_mean, remembered
from fastmeta.state import Stateful

DistributionAlignment = Literal["none", "uniform", "labels"]
_BATCHES = 128  # of the running average, as published
_SMALL = 1e-6  # added to both of the ratio, as in the published code


class Alignment(Stateful):
    r"""Imputed labels whose average over the last 128 batches is that of a prior (ReMixMatch, section 3.1).

    .. math:: \tilde q = \mathrm{Normalize}\big(q \cdot p(y) / \tilde p(y)\big)

    with the running average :math:`\tilde p` of the predictions q of earlier steps, uniform before the first.

    Args:
        prior: ``uniform``, over the classes that have labels, or ``labels``, their share of the labels (as where both
            sets are imbalanced alike).
        labels: classes of the labeled images ``[L]``.
        num_classes: C.

    >>> alignment = Alignment("labels", torch.tensor([0, 0, 0, 1]), 2)
    >>> alignment(torch.tensor([[0.5, 0.5]]))
    tensor([[0.7500, 0.2500]])
    """

    prior: Tensor  # [C]
    recent: Tensor  # [128, C], oldest first

    def __init__(self, prior: Literal["uniform", "labels"], labels: Tensor, num_classes: int) -> None:
        super().__init__()
        counts = torch.bincount(labels.cpu(), minlength=num_classes).double()
        shares = counts if prior == "labels" else (counts > 0).double()
        self.register_buffer("prior", shares / shares.sum())
        self.register_buffer("recent", torch.full((_BATCHES, num_classes), 1 / num_classes, dtype=torch.float64))

    def forward(self, labels: Tensor) -> Tensor:
        """Aligned ``labels [N, C]``, on their graph."""
        ratio = (self.prior + _SMALL) / (self.recent.mean(dim=0) + _SMALL)
        weighted = labels * ratio.to(labels.dtype)
        return weighted / weighted.sum(dim=1, keepdim=True)

    @torch.no_grad()
    def update(self, predictions: Tensor, batch: TrainingBatch) -> None:
        """Take in the ``predictions [B_u, C]`` of a batch, before alignment; their mean is that of all processes."""
        mean = joined_mean(predictions, batch.unlabeled_share, batch.process_group)
        self.recent.copy_(torch.cat([self.recent[1:], mean.unsqueeze(0)]))


def alignment_for(prior: DistributionAlignment, labels: Tensor, num_classes: int) -> Alignment | None:
    """None for ``none``."""
    return None if prior == "none" else Alignment(prior, labels, num_classes)


def aligned(
    prior: DistributionAlignment, memory: nn.Module | None, predictions: Tensor, batch: TrainingBatch
) -> Tensor:
    """Labels ``[N, C]`` from ``predictions``, which the memory then takes in; themselves for ``none``.

    Raises:
        ValueError: there is no memory although it is needed.
    """
    if prior == "none":
        return predictions
    alignment = remembered(memory, Alignment)
    labels: Tensor = alignment(predictions)
    alignment.update(predictions, batch)
    return labels
