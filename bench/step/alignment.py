"""Label Gradient Alignment with fastmeta, in the loop that trains on a table's labels.

The paper's algorithm is itself ``fused``: labels and parameters move along gradients of one forward. ``alternating`` is
:meth:`refine` with the model, which takes both gradients by passes of its own.
"""

import torch
from torch import Tensor
from torch.nn import functional

import fastmeta
from bench.step.bases import TableLabels
from bench.step.published import DECAY, EPSILON
from bench.step.task import Batch, Network
from fastmeta import losses, ops
from fastmeta.derivatives import How
from fastmeta.ops.masked_adam_table import MaskedAdamTable


class AlignmentStep(TableLabels):
    def __init__(self, network: Network, batch: Batch, how: How = "last_layer") -> None:
        super().__init__(network, batch)
        self.how = how
        self.method = fastmeta.LabelGradientAlignment(*self.table.shape, how=how, dtype=self.table.dtype)


class FusedLastLayer(AlignmentStep):
    def loss(self) -> Tensor:
        with fastmeta.capture_features(self.model) as tape:
            labeled, unlabeled = self.model(self.batch.labeled), self.model(self.batch.weak)
        refined = self.refine_outputs(tape, unlabeled, labeled, index=self.batch.index)
        loss = functional.cross_entropy(labeled, self.batch.targets)
        return loss + functional.cross_entropy(unlabeled, refined.labels) + refined.loss


class AlternatingWholeModel(AlignmentStep):
    def loss(self) -> Tensor:
        return self.loss_on(self.refine_model(self.batch.weak, index=self.batch.index).labels)


class FusedWholeModel(TableLabels):
    """From fastmeta's parts: the base's two backwards give both gradients, one more pass the derivative."""

    def __init__(self, network: Network, batch: Batch, how: How) -> None:
        super().__init__(network, batch)
        self.how = how
        self.labels = MaskedAdamTable(self.table, lr=0.01)
        self.ema_labeled: list[Tensor] = []
        self.ema_fourth: list[Tensor] = []

    def __call__(self) -> Tensor:
        names, parameters = zip(*self.model.named_parameters(), strict=True)
        labels = self.labels.rows(self.batch.index).softmax(1)
        labeled = self.labeled_loss()
        g_l = torch.autograd.grad(labeled, parameters)
        unlabeled = functional.cross_entropy(self.model(self.batch.weak), labels)
        g_u = torch.autograd.grad(unlabeled, parameters)
        direction = dict(zip(names, self.direction(list(g_l), list(g_u)), strict=True))
        gradient = fastmeta.label_gradient(self.model, self.batch.weak, direction, scale=1 / len(labels), how=self.how)
        self.labels.step_(self.batch.index, losses.softmax_jacobian(labels, gradient))
        for parameter, first, second in zip(parameters, g_l, g_u, strict=True):
            parameter.grad = first + second
        self.optimizer.step()
        return (labeled + unlabeled).detach()

    def direction(self, g_l: list[Tensor], g_u: list[Tensor]) -> list[Tensor]:
        if not self.ema_labeled:
            self.ema_labeled = [g.clone() for g in g_l]
            self.ema_fourth = [(first - second) ** 4 for first, second in zip(g_l, g_u, strict=True)]
        return ops.alignment_direction(
            g_l, g_u, self.ema_labeled, self.ema_fourth, decay=DECAY, decay_norm=DECAY, epsilon=EPSILON
        )
