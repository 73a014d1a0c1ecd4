"""The plain steps: the base algorithms without a method. F is one forward of B images; a backward is 2 F."""

import torch
from torch import Tensor
from torch.nn import functional

from bench.step.task import UNLABELED, Images, Network, Step, squared_error
from fastmeta.training.config import AverageConfig
from fastmeta.training.ema import ExponentialMovingAverage


class MeanTeacher(Step):
    """The step that Learning to Impute extends: 3 F for each of labeled and unlabeled images, 1 F for the teacher.

    Teacher and student see different views, each batch its own statistics, as published.
    """

    weight = 5.0

    def __init__(self, network: Network, batch: Images) -> None:
        super().__init__(network, batch)
        self.average = ExponentialMovingAverage(self.model, AverageConfig(0.999))

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.model.parameters(), lr=1e-4)

    def teacher_labels(self) -> Tensor:
        with torch.no_grad():
            return self.average.model(self.batch.strong).softmax(1)

    def update(self) -> None:
        super().update()
        self.average.update()

    def loss(self) -> Tensor:
        labels = self.teacher_labels()
        return self.labeled_loss() + self.weight * squared_error(self.model(self.batch.weak), labels)


class FixMatch(Step):
    """One forward and one backward of labeled, weak and strong images together, as published: 9 F."""

    threshold = 0.95

    def forward(self) -> tuple[Tensor, ...]:
        batch = self.batch
        parts = [batch.labeled, batch.weak, batch.strong]
        return self.model(torch.cat(parts)).split([len(part) for part in parts])

    def losses(self, labeled: Tensor, strong: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        supervised = functional.cross_entropy(labeled, self.batch.targets)
        return supervised + self.unlabeled_loss(strong, labels, weights)

    def unlabeled_loss(self, strong: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """The strong view's loss against the weak view's confident labels."""
        confidence, classes = labels.max(1)
        per_example = (confidence >= self.threshold) * functional.cross_entropy(strong, classes, reduction="none")
        return (per_example if weights is None else weights * per_example).mean()

    def loss(self) -> Tensor:
        labeled, weak, strong = self.forward()
        return self.losses(labeled, strong, weak.detach().softmax(1))


class SeparateFixMatch(FixMatch):
    """The cheapest form of it: the weak view without a graph, 7 F. Each pass has its own batch statistics."""

    def imputed(self) -> Tensor:
        with torch.no_grad():
            return self.model(self.batch.weak).softmax(1)

    def loss(self) -> Tensor:
        labels = self.imputed()
        return self.losses(self.model(self.batch.labeled), self.model(self.batch.strong), labels)


class PseudoLabel(Step):
    """The step that Meta-Gradient extends: soft labels in evaluation mode (1 F), then a step on both batches (6 F)."""

    def imputed_logits(self) -> Tensor:
        """The model's predictions with its running statistics; leaves it in training mode."""
        self.model.eval()
        with torch.no_grad():
            logits = self.model(self.batch.weak)
        self.model.train()
        return logits

    def loss_on(self, labels: Tensor) -> Tensor:
        return self.labeled_loss() + squared_error(self.model(self.batch.weak), labels)

    def loss(self) -> Tensor:
        return self.loss_on(self.imputed_logits().softmax(1))


class TableLabels(Step):
    """The step that Label Gradient Alignment extends: cross-entropies on labels given and labels from a table, 6 F."""

    def __init__(self, network: Network, batch: Images) -> None:
        super().__init__(network, batch)
        self.table = torch.zeros(UNLABELED, self.num_classes, dtype=batch.labeled.dtype, device=self.device)

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.model.parameters(), lr=1e-4)

    def loss_on(self, labels: Tensor) -> Tensor:
        return self.labeled_loss() + functional.cross_entropy(self.model(self.batch.weak), labels)

    def loss(self) -> Tensor:
        return self.loss_on(self.table[self.batch.index].softmax(1))


class TwoGradients(TableLabels):
    """The same step by its two gradients, from which the labels move as well."""

    def __init__(self, network: Network, batch: Images) -> None:
        super().__init__(network, batch)
        self.parameters: list[Tensor] = list(self.model.parameters())
        self.ema_labeled: list[Tensor] = []
        self.ema_fourth: list[Tensor] = []

    def labels(self) -> Tensor:
        raise NotImplementedError

    def move_labels(self, labels: Tensor, g_l: list[Tensor], g_u: list[Tensor]) -> None:
        """``g_u`` has a graph where the labels have one."""
        raise NotImplementedError

    def __call__(self) -> Tensor:
        labels, labeled = self.labels(), self.labeled_loss()
        g_l = list(torch.autograd.grad(labeled, self.parameters))
        unlabeled = functional.cross_entropy(self.model(self.batch.weak), labels)
        g_u = list(torch.autograd.grad(unlabeled, self.parameters, create_graph=labels.requires_grad))
        if not self.ema_labeled:
            self.ema_labeled = [g.clone() for g in g_l]
            self.ema_fourth = [(first - second.detach()) ** 4 for first, second in zip(g_l, g_u, strict=True)]
        self.move_labels(labels, g_l, g_u)
        for parameter, first, second in zip(self.parameters, g_l, g_u, strict=True):
            parameter.grad = first + second.detach()
        self.optimizer.step()
        return (labeled + unlabeled).detach()
