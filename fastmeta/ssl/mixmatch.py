"""MixMatch (Berthelot et al., 2019)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmeta.ssl.alignment import DistributionAlignment, aligned, alignment_for
from fastmeta.ssl.base import Algorithm, Refiner, StepLoss, TrainingBatch, refine
from fastmeta.ssl.labels import Ramp, as_they_are, ramp_up, sharpen
from fastmeta.ssl.mixing import Mixed, mix_up, shuffled_partners
from fastmeta.ssl.passes import Statistics, forward_parts, guessing


@dataclass(frozen=True)
class MixMatch(Algorithm):
    """One guess for K weak views of an image, sharpened, and everything mixed with everything.

    ``q_i = sharpen((1/K) sum_k softmax f(x_ik), temperature)`` without gradient; then each labeled image and each view
    are mixed with a partner from all of them (Algorithm 1), and the loss (Eq. (2) to (5)) is ``CE(f(x'_l), y'_l) +
    ramp(t) * weight * mean_ik (1/C) sum_c (softmax f(x'_ik) - q'_ik)_c^2``.

    Guesses are of passes in training mode, a batch for each view, that leave running statistics alone. A method refines
    the average before it is sharpened: with the features of the first view (``imputed``) or of the second
    (``learned``), of unmixed images. Example weights are those of the larger share of a mixed image. Partners come from
    the images of all processes.

    Args:
        views: K, at least 2.
        temperature: of the sharpening.
        alpha: both parameters of mix-up's Beta distribution.
        weight: of the unlabeled loss after the ramp; published: 75 on CIFAR-10, 250 on SVHN.
        ramp: fraction of training over which that weight rises; published: 16,384 of 2^20 steps.
        ramp_shape: sigmoid or linear.
        distribution_alignment: see :class:`fastmeta.ssl.Alignment`.
        statistics: of batch normalization on mixed images, see :func:`fastmeta.ssl.passes.forward_parts`.
    """

    views: int = 2
    temperature: float = 0.5
    alpha: float = 0.75
    weight: float = 75.0
    ramp: float = 1 / 64
    ramp_shape: Ramp = "linear"
    distribution_alignment: DistributionAlignment = "none"
    statistics: Statistics = "interleaved"

    imputes: ClassVar[bool] = True
    second_view: ClassVar[Literal["weak", "strong"] | None] = "weak"

    @property
    def more_views(self) -> int:
        """All but the first two."""
        return self.views - 2

    def memory(self, num_unlabeled: int, num_classes: int, *, model: nn.Module, labels: Tensor) -> nn.Module | None:
        """The running average of distribution alignment, if any."""
        return alignment_for(self.distribution_alignment, labels, num_classes)

    def finish(self, labels: Tensor, memory: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """Sharp labels, all of which count."""
        return as_they_are(sharpen(labels, self.temperature))

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
        assert batch.second is not None
        views = [batch.weak, batch.second, *batch.more]
        with guessing(model, refiner) as (network, tape):
            logits = [network(view) for view in views]
            labeled_logits = logits[0][:0] if refiner is None else network(batch.labeled)
        guess = torch.stack([each.softmax(dim=1) for each in logits]).mean(dim=0)
        imputed = aligned(self.distribution_alignment, memory, guess, batch)
        used = refine(
            refiner,
            tape,
            model,
            batch,
            imputed=imputed,
            views={"imputed": logits[0], "learned": logits[1]},
            inputs={"imputed": batch.weak, "learned": batch.second},
            labeled_logits=labeled_logits,
            finish=self.finish,
        )
        mixed = mixed_with_all(batch, views, used.labels, self.alpha)
        mixed_labeled, *mixed_views = forward_parts(model, [part.inputs for part in mixed], self.statistics)
        labeled = batch.labeled_share * functional.cross_entropy(mixed_labeled, mixed[0].targets)
        distances = [
            (each.softmax(dim=1) - part.targets).square().mean(dim=1)
            for each, part in zip(mixed_views, mixed[1:], strict=True)
        ]
        unlabeled = batch.unlabeled_share * (used.weights * torch.stack(distances)).mean()
        weight = self.weight * ramp_up(progress, self.ramp, self.ramp_shape)
        total = labeled + weight * unlabeled + used.loss
        return StepLoss(total, labeled.detach(), unlabeled.detach(), imputed.detach(), used)


def mixed_with_all(batch: TrainingBatch, views: Sequence[Tensor], labels: Tensor, alpha: float) -> list[Mixed]:
    """The labeled images and each view, mixed with partners from all of them; the own share is the larger.

    Args:
        batch: the step's data.
        views: of the unlabeled images, each ``[B_u, ...]``.
        labels: of these ``[B_u, C]``, without a graph.
        alpha: both parameters of the Beta distribution.
    """
    targets = functional.one_hot(batch.targets, labels.shape[1]).to(labels)
    parts = [Mixed(batch.labeled, targets), *(Mixed(view, labels) for view in views)]
    order, share = batch.random("partners") or (None, None), batch.random("mix-up") or (None, None)
    kinds = [0, *[1] * len(views)]  # every view draws anew from what the unlabeled images have
    partners = shuffled_partners(parts, [order[kind] for kind in kinds], batch.process_group)
    return [
        mix_up(*part, *partner, alpha=alpha, favors_first=True, random=share[kind])
        for part, partner, kind in zip(parts, partners, kinds, strict=True)
    ]
