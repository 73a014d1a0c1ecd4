"""The loop around Meta-Gradient: mix-up with imputed labels, and consistency with them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmeta import losses
from fastmeta.ssl.base import Algorithm, Refiner, StepLoss, TrainingBatch, features_for, refine
from fastmeta.ssl.labels import Ramp, kl_divergence, ramp_up
from fastmeta.ssl.mixing import mix_up


@dataclass(frozen=True)
class MixUpConsistency(Algorithm):
    """Labeled images are mixed with unlabeled ones, and the model shall say of these what it said before.

    ``KL(y_mix || f(x_mix)) + ramp(t) weight mean_i |p_i - q_i|^2``, ``p = softmax f(x_i)`` in training mode, ``q`` what
    a method makes of the same image's prediction in evaluation mode (running statistics, no dropout), a constant;
    ``x_mix`` and ``y_mix`` mix each labeled image and its label with an unlabeled one and q (Meta-Gradient, Algorithm 2
    with Eq. (17); the published code has the ramp). Without a method it is its baseline with mix-up alone. The papers'
    batches are of one size; of two, the smaller is gone through again until every image of the larger has a partner (of
    its own process, so that partners depend on how many there are). To batch normalization the mixed images are a batch
    and the unlabeled ones another, and both move running statistics, as published.

    With ``mix_up=False`` the labeled part is the cross-entropy of the labeled images, as in the rows of the ablation
    that have no mix-up; with ``labeled_weight=0`` as well it is Algorithm 1 as printed, which descends the consistency
    alone.

    Args:
        alpha: both parameters of mix-up's Beta distribution (1.0 for CIFAR and ImageNet, 0.1 for SVHN).
        weight: of the consistency after the ramp.
        ramp: fraction of training over which that weight rises (0.01 for CIFAR and SVHN, 0 for ImageNet).
        ramp_shape: sigmoid or linear.
        mix_up: whether the labeled images are mixed with unlabeled ones.
        labeled_weight: of the labeled part.
        consistency: the loss between p and q, ``mse_probs`` (published) or ``cross_entropy``, whose gradient is that of
            ``KL(q || p)``: the ``inner_loss`` of the method.
    """

    alpha: float = 1.0
    weight: float = 1.0
    ramp: float = 0.01
    ramp_shape: Ramp = "linear"
    mix_up: bool = True
    labeled_weight: float = 1.0
    consistency: Literal["mse_probs", "cross_entropy"] = "mse_probs"

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
        network = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        on_graph = refiner is not None and refiner.method.update.needs_graph
        with features_for(refiner, network) as tape, _evaluated(network), torch.set_grad_enabled(on_graph):
            logits = network(torch.cat([batch.labeled, batch.weak]))
        labeled_logits, imputed_logits = logits.split([len(batch.labeled), len(batch.weak)])
        used = refine(
            refiner,
            tape,
            model,
            batch,
            imputed=imputed_logits.softmax(dim=1),
            views={"imputed": imputed_logits, "learned": imputed_logits},
            inputs={"imputed": batch.weak, "learned": batch.weak},
            labeled_logits=labeled_logits,
        )
        labeled = self._labeled_loss(model, batch, used.labels)
        per_example = losses.loss_per_example(model(batch.weak), used.labels, self.consistency)
        unlabeled = batch.unlabeled_share * (used.weights * per_example).mean()
        weight = self.weight * ramp_up(progress, self.ramp, self.ramp_shape)
        total = self.labeled_weight * labeled + weight * unlabeled + used.loss
        return StepLoss(total, labeled.detach(), unlabeled.detach(), imputed_logits.detach().softmax(dim=1), used)

    def _labeled_loss(self, model: nn.Module, batch: TrainingBatch, labels: Tensor) -> Tensor:
        """Of the labeled images alone, or mixed with unlabeled ones and their ``labels``; 0 where its weight is."""
        if self.labeled_weight == 0:  # no pass, which would move running statistics
            return labels.new_zeros(())
        if not self.mix_up:
            return batch.labeled_share * functional.cross_entropy(model(batch.labeled), batch.targets)
        targets = functional.one_hot(batch.targets, labels.shape[1]).to(labels)
        pairs = torch.arange(max(len(targets), len(labels)), device=targets.device)
        first, second = pairs % len(targets), pairs % len(labels)
        random, larger = batch.random("mix-up"), 0 if len(targets) >= len(labels) else 1
        mixed = mix_up(
            batch.labeled[first],
            targets[first],
            batch.weak[second],
            labels[second],
            alpha=self.alpha,
            random=None if random is None else random[larger],
        )
        share = (batch.labeled_share, batch.unlabeled_share)[larger]
        return share * kl_divergence(model(mixed.inputs), mixed.targets)


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """The model is in evaluation mode within the block, and in training mode after it."""
    model.eval()
    try:
        yield
    finally:
        model.train()
