"""Learned example weights with fastmeta, in FixMatch's loops; the hold-out examples are the labeled ones.

``fused``: the passes of the base serve. ``alternating``, as published: the weights move by passes of their own
(labeled, weak and strong images) before the base's step. Published is one update in 100 steps; here every step makes
one, unless the variant says otherwise.
"""

import torch
from torch import Tensor

import fastmeta
from bench.step.bases import FixMatch, SeparateFixMatch
from bench.step.task import UNLABELED, Images, Network
from fastmeta.derivatives import How

NEVER = 10**9


class FusedLastLayer(FixMatch):
    """``update=False``: a step between two updates, which only reads the weights."""

    def __init__(self, network: Network, batch: Images, *, update: bool = True) -> None:
        super().__init__(network, batch)
        dtype = batch.labeled.dtype
        self.method = fastmeta.ExampleWeights(UNLABELED, interval=1 if update else NEVER, dtype=dtype)

    def loss(self) -> Tensor:
        with fastmeta.capture_features(self.model) as tape:
            labeled, weak, strong = self.forward()
        refined = self.refine_outputs(tape, weak, labeled, strong=tape.outputs(strong), index=self.batch.index)
        return self.losses(labeled, strong, refined.labels, refined.weights)


class AlternatingLastLayer(FusedLastLayer):
    def loss(self) -> Tensor:
        with torch.no_grad(), fastmeta.capture_features(self.model) as tape:
            labeled, weak, strong = self.forward()
        refined = self.refine_outputs(tape, weak, labeled, strong=tape.outputs(strong), index=self.batch.index)
        labeled, weak, strong = self.forward()
        return self.losses(labeled, strong, weak.detach().softmax(1), refined.weights)


class WholeModel(SeparateFixMatch):
    """Identity in place of the inverse Hessian, the whole model; each pass on its own, so that the labeled can lead."""

    def __init__(self, network: Network, batch: Images, how: How) -> None:
        super().__init__(network, batch)
        dtype = batch.labeled.dtype
        self.method = fastmeta.ExampleWeights(UNLABELED, inverse_hessian="identity", how=how, dtype=dtype)


class FusedWholeModel(WholeModel):
    def loss(self) -> Tensor:
        strong, labels = self.batch.strong, self.imputed()
        self.labeled_loss().backward()
        given = {"holdout_gradient": self.gradient(), "index": self.batch.index, "labels": labels}
        weights = self.refine_model(strong, **given).weights
        return self.unlabeled_loss(self.model(strong), labels, weights)


class AlternatingWholeModel(WholeModel):
    def loss(self) -> Tensor:
        strong, labels = self.batch.strong, self.imputed()
        weights = self.refine_model(strong, index=self.batch.index, labels=labels).weights
        return self.losses(self.model(self.batch.labeled), self.model(strong), labels, weights)
