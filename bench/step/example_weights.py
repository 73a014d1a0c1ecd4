"""Learned example weights with fastmeta, in FixMatch's loops; the hold-out examples are the labeled ones.

``fused``: the passes of the base serve. ``alternating``, as published: the weights move by passes of their own
(labeled, weak and strong images) before the base's step. Published is one update in 100 steps; here every step makes
one, unless the variant says otherwise.
"""

import torch
from torch import Tensor
from torch.nn import functional

import fastmeta
from bench.step.bases import FixMatch, SeparateFixMatch
from bench.step.task import UNLABELED, Batch, Network
from fastmeta.derivatives import How

NEVER = 10**9


class FusedLastLayer(FixMatch):
    """``update=False``: a step between two updates, which only reads the weights."""

    def __init__(self, network: Network, batch: Batch, *, update: bool = True) -> None:
        super().__init__(network, batch)
        dtype = batch.labeled.dtype
        self.method = fastmeta.ExampleWeights(UNLABELED, interval=1 if update else NEVER, dtype=dtype)

    def __call__(self) -> Tensor:
        with fastmeta.capture_features(self.model) as tape:
            labeled, weak, strong = self.forward()
        refined = self.method.refine(
            unlabeled=tape.outputs(weak),
            strong=tape.outputs(strong),
            holdout=tape.outputs(labeled),
            targets=self.batch.targets,
            index=self.batch.index,
        )
        unlabeled = self.unlabeled_loss(strong, refined.labels, refined.weights)
        return self.finish(functional.cross_entropy(labeled, self.batch.targets) + unlabeled)


class AlternatingLastLayer(FixMatch):
    def __init__(self, network: Network, batch: Batch) -> None:
        super().__init__(network, batch)
        self.method = fastmeta.ExampleWeights(UNLABELED, dtype=batch.labeled.dtype)

    def __call__(self) -> Tensor:
        with torch.no_grad(), fastmeta.capture_features(self.model) as tape:
            labeled, weak, strong = self.forward()
        weights = self.method.refine(
            unlabeled=tape.outputs(weak),
            strong=tape.outputs(strong),
            holdout=tape.outputs(labeled),
            targets=self.batch.targets,
            index=self.batch.index,
        ).weights
        labeled, weak, strong = self.forward()
        unlabeled = self.unlabeled_loss(strong, weak.detach().softmax(1), weights)
        return self.finish(functional.cross_entropy(labeled, self.batch.targets) + unlabeled)


class WholeModel(SeparateFixMatch):
    """Identity in place of the inverse Hessian, the whole model; each pass on its own, so that the labeled can lead."""

    def __init__(self, network: Network, batch: Batch, how: How) -> None:
        super().__init__(network, batch)
        dtype = batch.labeled.dtype
        self.method = fastmeta.ExampleWeights(UNLABELED, inverse_hessian="identity", how=how, dtype=dtype)


class FusedWholeModel(WholeModel):
    def __call__(self) -> Tensor:
        labels = self.imputed()
        self.optimizer.zero_grad()
        labeled_loss = self.labeled_loss()
        labeled_loss.backward()
        refined = self.method.refine(
            model=self.model,
            unlabeled=self.batch.strong,
            holdout_gradient=self.gradient(),
            index=self.batch.index,
            labels=labels,
        )
        loss = self.unlabeled_loss(self.model(self.batch.strong), labels, refined.weights)
        loss.backward()
        self.optimizer.step()
        return labeled_loss.detach() + loss.detach()


class AlternatingWholeModel(WholeModel):
    def __call__(self) -> Tensor:
        labels = self.imputed()
        weights = self.method.refine(
            model=self.model,
            unlabeled=self.batch.strong,
            holdout=self.batch.labeled,
            targets=self.batch.targets,
            index=self.batch.index,
            labels=labels,
        ).weights
        return self.finish(self.labeled_loss() + self.unlabeled_loss(self.model(self.batch.strong), labels, weights))
