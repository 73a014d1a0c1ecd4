"""The normalized gap between two gradients."""

from typing import Any

import torch
from torch import Tensor

from fastmeta import ops
from fastmeta.problem import AnyDirection, Problem, Reduction, vectors


class NormalizedGap:
    """The gap between labeled and unlabeled gradient, each coordinate divided by its own scale.

    ``2 v / (epsilon + sqrt(EMA(v^4)))`` with ``v = EMA(g_l) - g_u``: minus the gradient of the objective of Label
    Gradient Alignment (Algorithm 1, Eq. (2)) with respect to ``g_u``, averages held constant. The averages start from
    the first batch.

    Args:
        decay: of the average of ``g_l``.
        decay_norm: of the average of ``v^4``.
        epsilon: added to the scale.
        loss: of both gradients.
        reduction: of both losses over their examples.
        include_current: whether the averages of a step include its own batch, or those before it alone.
    """

    def __init__(
        self,
        *,
        decay: float = 0.99,
        decay_norm: float = 0.99,
        epsilon: float = 1e-3,
        loss: str = "cross_entropy",
        reduction: Reduction = "mean",
        include_current: bool = True,
    ) -> None:
        self.decay = decay
        self.decay_norm = decay_norm
        self.epsilon = epsilon
        self.loss = loss
        self.reduction = reduction
        self.include_current = include_current
        self.ema_labeled: list[Tensor] = []
        self.ema_fourth: list[Tensor] = []

    def __call__(self, problem: Problem) -> AnyDirection:
        """Update the averages with this batch and return the direction."""
        labeled = problem.gradient("labeled", loss=self.loss, reduction=self.reduction)
        unlabeled = problem.gradient("unlabeled", loss=self.loss, reduction=self.reduction)
        g_l, g_u = vectors.tensors(labeled), vectors.tensors(unlabeled)
        if not self.ema_labeled:
            self.ema_labeled = [g.to(_wide(g.dtype), copy=True) for g in g_l]
            self.ema_fourth = [(ema - g) ** 4 for ema, g in zip(self.ema_labeled, g_u, strict=True)]
        if [ema.shape for ema in self.ema_labeled] != [g.shape for g in g_l]:
            shapes = [[list(tensor.shape) for tensor in tensors] for tensors in (self.ema_labeled, g_l)]
            raise ValueError(f"the averages of {shapes[0]} do not fit gradients of {shapes[1]}; use one rule a layer")
        if any(
            ema.dtype != _wide(g.dtype) or ema.device != g.device for ema, g in zip(self.ema_labeled, g_l, strict=True)
        ):
            self.ema_labeled, self.ema_fourth = (
                [ema.to(g.device, _wide(g.dtype)) for ema, g in zip(averages, g_l, strict=True)]
                for averages in (self.ema_labeled, self.ema_fourth)
            )
        # With decays of 1 the operator uses the averages as they are.
        decays = (self.decay, self.decay_norm) if self.include_current else (1.0, 1.0)
        direction = ops.alignment_direction(
            g_l,
            g_u,
            self.ema_labeled,
            self.ema_fourth,
            decay=decays[0],
            decay_norm=decays[1],
            epsilon=self.epsilon,
        )
        if not self.include_current:
            fourth = torch._foreach_pow(torch._foreach_sub(self.ema_labeled, g_u), 4.0)
            torch._foreach_lerp_(self.ema_fourth, fourth, 1 - self.decay_norm)
            torch._foreach_lerp_(self.ema_labeled, [g.to(_wide(g.dtype)) for g in g_l], 1 - self.decay)
        return vectors.rebuilt(labeled, direction)

    def state_dict(self) -> dict[str, Any]:
        """The averages."""
        return {
            "ema_labeled": [ema.clone() for ema in self.ema_labeled],
            "ema_fourth": [ema.clone() for ema in self.ema_fourth],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the averages of :meth:`state_dict`."""
        self.ema_labeled = [ema.clone() for ema in state["ema_labeled"]]
        self.ema_fourth = [ema.clone() for ema in state["ema_fourth"]]


def _wide(gradient: torch.dtype) -> torch.dtype:
    """The averages' dtype: a 16-bit one would lose their increments, and v^4 its range."""
    return torch.float64 if gradient == torch.float64 else torch.float32
