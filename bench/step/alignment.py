"""Label Gradient Alignment with fastmeta, in the loop that trains on a table's labels.

The paper's algorithm is itself ``fused``: labels and parameters move along gradients of one forward. ``alternating`` is
:meth:`refine` with the model, which takes both gradients by passes of its own.
"""

from torch import Tensor
from torch.nn import functional

import fastmeta
from bench.step.bases import TableLabels, TwoGradients
from bench.step.published import DECAY, EPSILON
from bench.step.task import Images, Network
from fastmeta import losses, ops
from fastmeta.derivatives import How
from fastmeta.ops.masked_adam_table import MaskedAdamTable


class AlignmentStep(TableLabels):
    def __init__(self, network: Network, batch: Images, how: How = "last_layer") -> None:
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


class FusedWholeModel(TwoGradients):
    """From fastmeta's parts: the base's two backwards give both gradients, one more pass the derivative."""

    def __init__(self, network: Network, batch: Images, how: How) -> None:
        super().__init__(network, batch)
        self.how = how
        self.logits = MaskedAdamTable(self.table, lr=0.01)

    def labels(self) -> Tensor:
        return self.logits.rows(self.batch.index).softmax(1)

    def move_labels(self, labels: Tensor, g_l: list[Tensor], g_u: list[Tensor]) -> None:
        averages = self.ema_labeled, self.ema_fourth
        toward = ops.alignment_direction(g_l, g_u, *averages, decay=DECAY, decay_norm=DECAY, epsilon=EPSILON)
        direction = dict(zip(dict(self.model.named_parameters()), toward, strict=True))
        scale = 1 / len(labels)
        gradient = fastmeta.label_gradient(self.model, self.batch.weak, direction, scale=scale, how=self.how)
        self.logits.step_(self.batch.index, losses.softmax_jacobian(labels, gradient))
