"""Meta-Gradient with fastmeta, in the loop of its own base; the labels move before the base's step.

``alternating``, as published: the labeled gradient is taken in evaluation mode by passes of its own. ``fused``: it is
that of the labeled training pass; at the last layer its features serve.
"""

from torch import Tensor
from torch.nn import functional

import fastmeta
from bench.step.bases import PseudoLabel
from bench.step.published import META_RATE
from bench.step.task import Images, Network, squared_error
from fastmeta.derivatives import How


class MetaGradientStep(PseudoLabel):
    def __init__(self, network: Network, batch: Images, how: How = "last_layer") -> None:
        super().__init__(network, batch)
        self.method = fastmeta.MetaGradient.from_preset("official_code", step=META_RATE, how=how)


class Alternating(MetaGradientStep):
    def loss(self) -> Tensor:
        return self.loss_on(self.refine_model(self.batch.weak).labels)


class FusedLastLayer(MetaGradientStep):
    """The base's evaluation pass and its labeled training pass give both features and logits."""

    def loss(self) -> Tensor:
        with fastmeta.capture_features(self.model) as tape:
            imputed = self.imputed_logits()
            labeled = self.model(self.batch.labeled)
        refined = self.refine_outputs(tape, imputed, labeled)
        loss = functional.cross_entropy(labeled, self.batch.targets)
        return loss + squared_error(self.model(self.batch.weak), refined.labels)


class FusedWholeModel(MetaGradientStep):
    """The labeled backward leaves the direction in ``.grad``; labels and their gradient come from one pass."""

    def loss(self) -> Tensor:
        self.labeled_loss().backward()
        refined = self.refine_model(self.batch.weak, holdout_gradient=self.gradient())
        return squared_error(self.model(self.batch.weak), refined.labels)
