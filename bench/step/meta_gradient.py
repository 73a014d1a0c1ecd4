"""Meta-Gradient with fastmeta, in the loop of its own base; the labels move before the base's step.

``alternating``, as published: the labeled gradient is taken in evaluation mode by passes of its own. ``fused``: it is
that of the labeled training pass; at the last layer its features serve.
"""

from torch import Tensor
from torch.nn import functional

import fastmeta
from bench.step.bases import PseudoLabel
from bench.step.published import META_RATE
from bench.step.task import Batch, Network, squared_error
from fastmeta.derivatives import How


class MetaGradientStep(PseudoLabel):
    def __init__(self, network: Network, batch: Batch, how: How) -> None:
        super().__init__(network, batch)
        self.method = fastmeta.MetaGradient.from_preset("official_code", step=META_RATE, how=how)


class Alternating(MetaGradientStep):
    def __call__(self) -> Tensor:
        refined = self.method.refine(
            model=self.model, unlabeled=self.batch.weak, holdout=self.batch.labeled, targets=self.batch.targets
        )
        return self.train_on(refined.labels)


class FusedLastLayer(MetaGradientStep):
    """The base's evaluation pass and its labeled training pass give both features and logits."""

    def __init__(self, network: Network, batch: Batch) -> None:
        super().__init__(network, batch, "last_layer")

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad()
        with fastmeta.capture_features(self.model) as tape:
            imputed = self.imputed_logits()
            labeled = self.model(self.batch.labeled)
        refined = self.method.refine(
            unlabeled=tape.outputs(imputed), holdout=tape.outputs(labeled), targets=self.batch.targets
        )
        loss = functional.cross_entropy(labeled, self.batch.targets)
        loss = loss + squared_error(self.model(self.batch.weak), refined.labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class FusedWholeModel(MetaGradientStep):
    """The labeled backward leaves the direction in ``.grad``; labels and their gradient come from one pass."""

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad()
        labeled_loss = self.labeled_loss()
        labeled_loss.backward()
        refined = self.method.refine(model=self.model, unlabeled=self.batch.weak, holdout_gradient=self.gradient())
        loss = squared_error(self.model(self.batch.weak), refined.labels)
        loss.backward()
        self.optimizer.step()
        return labeled_loss.detach() + loss.detach()
