"""The methods in the form that was published: double backward through the inner step, and probes in place.

Written from the equations, as a good user writes them in plain PyTorch; nothing here is fastmeta's. The label gradients
of these steps are what the correctness gate holds fastmeta's to.
"""

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from bench.step.bases import MeanTeacher, PseudoLabel, TwoGradients
from bench.step.task import Images, Network, squared_error

L2I_RATE = 0.1  # eta of the inner step, on a sum over the batch (V1: 0.2, as in the published code)
LABEL_STEP = 1.0
META_RATE = 0.1  # the step on the labels
RADIUS = 0.01
EPSILON, DECAY = 1e-3, 0.99  # of Label Gradient Alignment


class PublishedL2I(MeanTeacher):
    """Learning to Impute, V2 ("O"): the base update, then the update of the imputer at the new parameters.

    ``two_views``: the labels are imputed from a view of their own, as in the published code; else, as in Algorithm 1,
    from the images that learn from them.
    """

    def __init__(self, network: Network, batch: Images, *, two_views: bool = False) -> None:
        super().__init__(network, batch)
        self.imputed_images = batch.strong if two_views else batch.weak

    def holdout_loss(self, imputed: Tensor, rate: float) -> Tensor:
        """``C^H(theta - rate grad C^U(theta, z))`` (Eq. (3)), on the graph of the labels ``z``."""
        theta = {name: value.detach().requires_grad_() for name, value in self.model.named_parameters()}
        inner = (functional_call(self.model, theta, (self.batch.weak,)).softmax(1) - imputed).square().sum()
        gradient = torch.autograd.grad(inner, list(theta.values()), create_graph=True)
        ahead = {name: value - rate * g for (name, value), g in zip(theta.items(), gradient, strict=True)}
        logits = functional_call(self.model, ahead, (self.batch.labeled,))
        return functional.cross_entropy(logits, self.batch.targets)

    def second_loss(self) -> Tensor:
        """Eq. (V2): the gradient reaches the parameters through the imputed labels alone."""
        return self.holdout_loss(self.model(self.imputed_images).softmax(1), L2I_RATE)

    def __call__(self) -> Tensor:
        super().__call__()
        # Not theta as well, which backward() would reach.
        return self.descend(self.second_loss, list(self.model.parameters()))


class PublishedL2IV1(PublishedL2I):
    """Variant V1 ("L"): a step on the labels' logits, then one on the loss against the labels found."""

    def second_loss(self) -> Tensor:
        with torch.no_grad():
            logits = self.model(self.imputed_images).log_softmax(1)
        logits.requires_grad_()
        (gradient,) = torch.autograd.grad(self.holdout_loss(logits.softmax(1), 2 * L2I_RATE), logits)
        labels = (logits - LABEL_STEP * gradient).detach().softmax(1)
        return squared_error(self.model(self.batch.weak), labels)


class PublishedMetaGradient(PseudoLabel):
    """Meta-Gradient, Algorithm 2: central differences along the labeled gradient, the parameters perturbed in place."""

    def __init__(self, network: Network, batch: Images) -> None:
        super().__init__(network, batch)
        self.parameters: list[Tensor] = list(self.model.parameters())

    def labeled_gradient(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.labeled_loss(), self.parameters)

    def probe(self) -> Tensor:
        with torch.no_grad():
            return self.model(self.batch.weak).softmax(1)

    def labels(self) -> Tensor:
        """The labels after their step, from the model in evaluation mode."""
        direction = self.labeled_gradient()
        imputed = self.probe()
        length = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(direction)))
        epsilon = RADIUS / float(length)
        with torch.no_grad():
            torch._foreach_add_(self.parameters, direction, alpha=epsilon)
            plus = self.probe()
            torch._foreach_add_(self.parameters, direction, alpha=-2 * epsilon)
            minus = self.probe()
            torch._foreach_add_(self.parameters, direction, alpha=epsilon)
        return move_labels(imputed, (plus - minus) / epsilon)

    def loss(self) -> Tensor:
        self.model.eval()
        labels = self.labels()
        self.model.train()
        return self.loss_on(labels)


class DoubleBackwardMetaGradient(PublishedMetaGradient):
    """Its Eq. (13) exactly: the inner step's gradient is differentiated with respect to the labels."""

    def labels(self) -> Tensor:
        direction = self.labeled_gradient()
        probabilities = self.model(self.batch.weak).softmax(1)
        imputed = probabilities.detach().requires_grad_()
        inner = (probabilities - imputed).square().sum()
        gradient = torch.autograd.grad(inner, self.parameters, create_graph=True)
        (against,) = torch.autograd.grad(gradient, imputed, direction)
        return move_labels(imputed.detach(), -against)


def move_labels(labels: Tensor, gradient: Tensor) -> Tensor:
    """A step on the labels, clipped at 0 and divided by the row sum."""
    moved = (labels - META_RATE * gradient).relu()
    total = moved.sum(1, keepdim=True)
    return moved / total.where(total > 0, 1.0)


class PublishedLabelGradientAlignment(TwoGradients):
    """Label Gradient Alignment, Algorithm 1 (no code was published): one double backward from the step's own gradient.

    Only the sampled rows move, each with its own Adam (the paper does not say which).
    """

    def __init__(self, network: Network, batch: Images) -> None:
        super().__init__(network, batch)
        self.rows = torch.zeros_like(self.table[: len(batch.index)]).requires_grad_()
        self.label_optimizer = torch.optim.Adam([self.rows], lr=0.01)

    def labels(self) -> Tensor:
        return self.rows.softmax(1)

    def move_labels(self, labels: Tensor, g_l: list[Tensor], g_u: list[Tensor]) -> None:
        (self.rows.grad,) = torch.autograd.grad(g_u, self.rows, self.toward_unlabeled(g_l, g_u))
        self.label_optimizer.step()

    @torch.no_grad()
    def toward_unlabeled(self, g_l: list[Tensor], g_u: list[Tensor]) -> list[Tensor]:
        """The objective's gradient with respect to ``g_u``, ``-2 v / (epsilon + sqrt(EMA(v^4)))``."""
        torch._foreach_lerp_(self.ema_labeled, g_l, 1 - DECAY)
        gap = torch._foreach_sub(self.ema_labeled, g_u)
        torch._foreach_lerp_(self.ema_fourth, torch._foreach_pow(gap, 4), 1 - DECAY)
        scale = torch._foreach_add(torch._foreach_sqrt(self.ema_fourth), EPSILON)
        return list(torch._foreach_mul(torch._foreach_div(gap, scale), -2.0))
