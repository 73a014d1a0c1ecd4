"""Learning to Impute with fastmeta, in Mean Teacher's and FixMatch's loops.

``fused``: method and base share what they run, and the labels are the teacher's with the student's derivative.
``alternating``, as published: the base's update, then one of the method at the new parameters with passes of its own.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

import fastmeta
from bench.step.bases import FixMatch, MeanTeacher
from bench.step.published import L2I_RATE
from bench.step.task import Images, Network, squared_error
from fastmeta.derivatives import How

Version = Literal["V1", "V2"]


class L2IStep(MeanTeacher):
    """With the settings of the published code, on the labels that it is given."""

    def __init__(
        self, network: Network, batch: Images, variant: Version, how: How = "last_layer", *, look_ahead: bool = False
    ) -> None:
        super().__init__(network, batch)
        self.variant = variant
        rate = L2I_RATE if variant == "V2" else 2 * L2I_RATE
        options: dict[str, Any] = {"how": how, "rate": rate, "look_ahead": look_ahead}
        self.method = fastmeta.L2I.from_preset("official_code", variant, **options)


class FusedLastLayer(L2IStep):
    """The features and logits of the base's own forward: nothing is run for the method."""

    def loss(self) -> Tensor:
        labels = self.teacher_labels()
        with fastmeta.capture_features(self.model) as tape:
            labeled, unlabeled = self.model(self.batch.labeled), self.model(self.batch.weak)
        probabilities = unlabeled.softmax(1)
        refined = self.refine_outputs(
            tape, unlabeled, labeled, labels=labels + (probabilities - probabilities.detach())
        )
        consistency = (probabilities - refined.labels).square().sum(1).mean()
        return functional.cross_entropy(labeled, self.batch.targets) + self.weight * consistency + refined.loss


class FusedWholeModel(L2IStep):
    """The labeled backward comes first and leaves the direction in ``.grad``; the derivative takes one more pass."""

    def loss(self) -> Tensor:
        labels = self.teacher_labels()
        self.labeled_loss().backward()
        probabilities = None
        if self.variant == "V2":  # the labels hang on the graph of the pass that learns from them
            probabilities = self.model(self.batch.weak).softmax(1)
            labels = labels + (probabilities - probabilities.detach())
        refined = self.refine_model(self.batch.weak, labels=labels, holdout_gradient=self.gradient())
        if probabilities is None:
            probabilities = self.model(self.batch.weak).softmax(1)
        return self.weight * (probabilities - refined.labels).square().sum(1).mean() + refined.loss


class Alternating(L2IStep):
    """``two_views``: the labels are imputed from a view of their own, and the hold-out gradient is looked ahead for,
    as in the published code. Else from the images that learn from them, as in Algorithm 1; the inner gradient on C^U
    is then 0, so that looking ahead would change nothing, and fewer passes do.
    """

    def __init__(self, network: Network, batch: Images, variant: Version, how: How, *, two_views: bool = False) -> None:
        super().__init__(network, batch, variant, how, look_ahead=two_views)
        self.two_views = two_views

    def __call__(self) -> Tensor:
        super().__call__()
        return self.descend(self.second_loss)

    def second_loss(self) -> Tensor:
        """The loss of the method's own update: V2's surrogate, or V1's consistency with the labels found."""
        raise NotImplementedError

    def given_labels(self) -> Tensor | None:
        if not self.two_views:
            return None
        with torch.set_grad_enabled(self.variant == "V2"):
            return self.model(self.batch.strong).softmax(1)


class AlternatingLastLayer(Alternating):
    def second_loss(self) -> Tensor:
        labels = self.given_labels()
        with fastmeta.capture_features(self.model) as tape:
            with torch.set_grad_enabled(self.variant == "V1" or labels is None):
                unlabeled = self.model(self.batch.weak)
            with torch.no_grad():
                labeled = self.model(self.batch.labeled)
        refined = self.refine_outputs(tape, unlabeled, labeled, labels=labels)
        return refined.loss if self.variant == "V2" else squared_error(unlabeled, refined.labels)


class AlternatingWholeModel(Alternating):
    def second_loss(self) -> Tensor:
        refined = self.refine_model(self.batch.weak, labels=self.given_labels())
        return refined.loss if self.variant == "V2" else squared_error(self.model(self.batch.weak), refined.labels)


class FixMatchLastLayer(FixMatch):
    """V2, fused, on the weak view of FixMatch's one forward."""

    def __init__(self, network: Network, batch: Images) -> None:
        super().__init__(network, batch)
        self.method = fastmeta.L2I.from_preset("official_code", "V2", how="last_layer", rate=L2I_RATE)

    def loss(self) -> Tensor:
        with fastmeta.capture_features(self.model) as tape:
            labeled, weak, strong = self.forward()
        refined = self.refine_outputs(tape, weak, labeled)
        return self.losses(labeled, strong, refined.labels) + refined.loss
