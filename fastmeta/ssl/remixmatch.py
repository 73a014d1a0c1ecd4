"""ReMixMatch (Berthelot et al., 2020)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmeta.capture import last_linear
from fastmeta.ssl.alignment import Alignment, DistributionAlignment, aligned, alignment_for
from fastmeta.ssl.base import Algorithm, Refiner, StepLoss, TrainingBatch, frozen_statistics, refine, remembered
from fastmeta.ssl.labels import Ramp, as_they_are, ramp_up, sharpen
from fastmeta.ssl.mixmatch import mixed_with_all
from fastmeta.ssl.passes import Statistics, forward_parts, guessing


@dataclass(frozen=True)
class ReMixMatch(Algorithm):
    """MixMatch with the guess of the weak view for K strong ones, aligned to a prior, and which way up an image is.

    ``q = sharpen(align(softmax f(weak)), temperature)`` without gradient; the labeled images, the weak and the K strong
    views are mixed as in MixMatch. The loss (Eq. (3)) is ``CE(f(x'_l), y'_l) + ramp(t) (weight * mean CE(f(x'), q') +
    unmixed_weight * mean_i CE(f(strong_i1), q_i)) + rotation_weight * mean_i CE(g(rotated strong_i1), r_i)`` with a
    quarter turn r of each image and a linear layer g on the features of the last layer. Labeled images are strong views
    in the paper (``labeled_view``).

    The guess, the unmixed and the rotated images are each a batch, in training mode, and leave running statistics
    alone. A method refines the aligned prediction before it is sharpened; example weights are those of the larger share
    of a mixed image, and of the unmixed one. Partners come from the images of all processes.

    Args:
        views: K, at least 1; published: 8 (with CTAugment).
        temperature: of the sharpening.
        alpha: both parameters of mix-up's Beta distribution.
        weight: of the mixed images' loss after the ramp.
        unmixed_weight: of the unmixed images' loss after the ramp.
        rotation_weight: of the loss of quarter turns, which needs square images; 0: none, and no layer for them.
        ramp: fraction of training over which the first two rise; published: 16,384 of 2^20 steps.
        ramp_shape: sigmoid or linear.
        distribution_alignment: see :class:`fastmeta.ssl.Alignment`; published: labels.
        statistics: of batch normalization on mixed images, see :func:`fastmeta.ssl.passes.forward_parts`;
            published: interleaved (running statistics are moved by the last part there, by the first here).
    """

    views: int = 2
    temperature: float = 0.5
    alpha: float = 0.75
    weight: float = 1.5
    unmixed_weight: float = 0.5
    rotation_weight: float = 0.5
    ramp: float = 1 / 64
    ramp_shape: Ramp = "linear"
    distribution_alignment: DistributionAlignment = "labels"
    statistics: Statistics = "interleaved"

    imputes: ClassVar[bool] = True
    second_view: ClassVar[Literal["weak", "strong"] | None] = "strong"

    @property
    def more_views(self) -> int:
        """All but the first of the strong ones."""
        return self.views - 1

    def memory(self, num_unlabeled: int, num_classes: int, *, model: nn.Module, labels: Tensor) -> nn.Module | None:
        """The running average of alignment, and the layer that tells turns, which is trained with the model.

        Raises:
            ValueError: the model is its last layer alone, whose features cannot be turned.
        """
        alignment = alignment_for(self.distribution_alignment, labels, num_classes)
        if not self.rotation_weight:
            return alignment
        layer, _ = last_linear(model)
        if layer is model:
            raise ValueError(
                "base_settings must have rotation_weight 0 for remixmatch where the last layer alone is trained: "
                f"features cannot be rotated, got {self.rotation_weight}"
            )
        return ReMixMatchMemory(alignment, nn.Linear(layer.in_features, 4).to(layer.weight.dtype))

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
        """See :class:`fastmeta.ssl.Algorithm`. ``StepLoss.unlabeled`` is the sum of its parts, each with its weight.

        Raises:
            ValueError: images are not square, and are to be turned.
        """
        assert batch.second is not None
        turns = remembered(memory, ReMixMatchMemory) if self.rotation_weight else None
        with guessing(model, refiner) as (network, tape):
            weak_logits = network(batch.weak)
            labeled_logits = weak_logits[:0] if refiner is None else network(batch.labeled)
            with torch.enable_grad():
                strong_logits = network(batch.second)
        imputed = aligned(
            self.distribution_alignment,
            memory if turns is None else turns.alignment,
            weak_logits.softmax(dim=1),
            batch,
        )
        used = refine(
            refiner,
            tape,
            model,
            batch,
            imputed=imputed,
            views={"imputed": weak_logits, "learned": strong_logits},
            inputs={"imputed": batch.weak, "learned": batch.second},
            labeled_logits=labeled_logits,
            finish=self.finish,
        )
        mixed = mixed_with_all(batch, [batch.second, *batch.more, batch.weak], used.labels, self.alpha)
        mixed_labeled, *mixed_views = forward_parts(model, [part.inputs for part in mixed], self.statistics)
        losses = [
            functional.cross_entropy(each, part.targets, reduction="none")
            for each, part in zip(mixed_views, mixed[1:], strict=True)
        ]
        unmixed = functional.cross_entropy(strong_logits, used.labels, reduction="none")
        per_example = self.weight * torch.stack(losses).mean(dim=0) + self.unmixed_weight * unmixed

        labeled = batch.labeled_share * functional.cross_entropy(mixed_labeled, mixed[0].targets)
        unlabeled = batch.unlabeled_share * (used.weights * per_example).mean()
        unlabeled = ramp_up(progress, self.ramp, self.ramp_shape) * unlabeled
        if turns is not None:
            rotation = turns.loss(model, batch)
            unlabeled = unlabeled + self.rotation_weight * batch.unlabeled_share * rotation
        total = labeled + unlabeled + used.loss
        return StepLoss(total, labeled.detach(), unlabeled.detach(), imputed.detach(), used)


class ReMixMatchMemory(nn.Module):
    """What ReMixMatch keeps where it turns images.

    Args:
        alignment: the running average, if labels are aligned.
        head: from features to the logits of four quarter turns.
    """

    def __init__(self, alignment: Alignment | None, head: nn.Linear) -> None:
        super().__init__()
        self.alignment = alignment
        self.head = head

    def loss(self, model: nn.Module, batch: TrainingBatch) -> Tensor:
        """``mean_i CE(g(rotated strong_i), r_i)``, scalar."""
        images = batch.second
        assert images is not None
        if images.dim() != 4 or images.shape[2] != images.shape[3]:
            raise ValueError(f"images must be square [N, channels, size, size] to be rotated, got {list(images.shape)}")
        random = batch.random("rotation")
        if random is None:
            turn = torch.randint(4, (len(images),), device=images.device)
        else:
            turn = random[1].integers(0, 4, 1)[:, 0]
        each = torch.stack([torch.rot90(images, k, (2, 3)) for k in range(4)])
        rotated = each[turn, torch.arange(len(images), device=images.device)]
        with frozen_statistics(model), _last_features(model) as features:
            model(rotated)
        return functional.cross_entropy(self.head(features[0]), turn)


@contextmanager
def _last_features(model: nn.Module) -> Iterator[list[Tensor]]:
    """What goes into the last layer in the block, on the graph."""
    layer, _ = last_linear(model)
    found: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    try:
        yield found
    finally:
        handle.remove()
