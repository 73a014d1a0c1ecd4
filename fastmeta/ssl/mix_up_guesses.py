"""Mix-up (Zhang et al., 2018) as a semi-supervised baseline (Berthelot et al., 2019)."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

from torch import nn
from torch.nn import functional

from fastmeta.ssl.base import Algorithm, Refiner, StepLoss, TrainingBatch, refine
from fastmeta.ssl.labels import Ramp, as_they_are, harden, ramp_up
from fastmeta.ssl.mixing import Mixed, mix_up, shuffled_partners
from fastmeta.ssl.passes import Statistics, forward_parts, guessing


@dataclass(frozen=True)
class MixUp(Algorithm):
    """Labeled images are mixed with labeled ones, and unlabeled with unlabeled ones and the model's guesses.

    ``CE(f(x'_l), y'_l) + ramp(t) * weight * mean_i CE(f(x'_i), q'_i)``, each image and its label mixed with those of a
    partner, ``lambda = max(lambda, 1 - lambda)`` and ``q = softmax f(x_i)`` without gradient, of a pass in training
    mode that leaves running statistics alone. MixMatch's repository has no ramp. A method refines q; to one that weighs
    examples it is given one-hot: a prediction as its own soft label has no gradient to weigh. Example weights are those
    of the larger share. Partners come from the images of all processes.

    Args:
        alpha: both parameters of the Beta distribution; published: 0.75 (SVHN: 0.25).
        weight: of the unlabeled loss after the ramp.
        ramp: fraction of training over which that weight rises.
        ramp_shape: sigmoid or linear.
        statistics: of batch normalization, see :func:`fastmeta.ssl.passes.forward_parts`.
    """

    alpha: float = 0.75
    weight: float = 1.0
    ramp: float = 0.0
    ramp_shape: Ramp = "linear"
    statistics: Statistics = "separate"

    imputes: ClassVar[bool] = True
    second_view: ClassVar[Literal["weak", "strong"] | None] = None

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
        with guessing(model, refiner) as (network, tape):
            logits = network(batch.weak)
            labeled_logits = logits[:0] if refiner is None else network(batch.labeled)
        used = refine(
            refiner,
            tape,
            model,
            batch,
            imputed=logits.softmax(dim=1),
            views={"imputed": logits, "learned": logits},
            inputs={"imputed": batch.weak, "learned": batch.weak},
            labeled_logits=labeled_logits,
            finish=partial(harden, threshold=0.0) if refiner is not None and refiner.hard else as_they_are,
        )
        targets = functional.one_hot(batch.targets, logits.shape[1]).to(used.labels)
        parts = [Mixed(batch.labeled, targets), Mixed(batch.weak, used.labels)]
        orders, shares = batch.random("partners") or (None, None), batch.random("mix-up") or (None, None)
        mixed = []
        for part, order, share in zip(parts, orders, shares, strict=True):
            (partners,) = shuffled_partners([part], [order], batch.process_group)
            mixed.append(mix_up(*part, *partners, alpha=self.alpha, favors_first=True, random=share))
        mixed_logits = forward_parts(model, [part.inputs for part in mixed], self.statistics)
        labeled_losses, losses = (
            functional.cross_entropy(each, part.targets, reduction="none")
            for each, part in zip(mixed_logits, mixed, strict=True)
        )
        labeled = batch.labeled_share * labeled_losses.mean()
        unlabeled = batch.unlabeled_share * (used.weights * losses).mean()
        weight = self.weight * ramp_up(progress, self.ramp, self.ramp_shape)
        total = labeled + weight * unlabeled + used.loss
        return StepLoss(total, labeled.detach(), unlabeled.detach(), logits.detach().softmax(dim=1), used)
