"""The normalized gap between two gradients."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastmeta import ops
from fastmeta.ops.found_inf import found_inf
from fastmeta.problem import AnyDirection, Problem, Reduction, vectors
from fastmeta.state import Number, Stateful, TensorList


class NormalizedGap(Stateful):
    """The gap between labeled and unlabeled gradient, each coordinate divided by its own scale.

    ``2 v / (epsilon + sqrt(EMA(v^4)))`` with ``v = EMA(g_l) - g_u``: minus the gradient of the objective of Label
    Gradient Alignment (Algorithm 1, Eq. (2)) with respect to ``g_u``, averages held constant. The averages start from
    the first batch. Where a gradient, or the fourth power of one, is not finite they stay as they are.

    Args:
        decay: of the average of ``g_l``.
        decay_norm: of the average of ``v^4``.
        epsilon: added to the scale.
        loss: of both gradients.
        reduction: of both losses over their examples.
        include_current: whether the averages of a step include its own batch, or those before it alone.
    """

    decay = Number(high=1.0)
    decay_norm = Number(high=1.0)
    epsilon = Number()

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
        super().__init__()
        self.decay = decay
        self.decay_norm = decay_norm
        self.epsilon = epsilon
        self.loss = loss
        self.reduction: Reduction = reduction
        self.include_current = include_current
        self.ema_labeled = TensorList()
        self.ema_fourth = TensorList()

    def forward(self, problem: Problem) -> AnyDirection:
        """Update the averages with this batch and return the direction."""
        labeled = problem.gradient("labeled", loss=self.loss, reduction=self.reduction)
        unlabeled = problem.gradient("unlabeled", loss=self.loss, reduction=self.reduction)
        g_l, g_u = vectors.tensors(labeled), vectors.tensors(unlabeled)
        if problem.sharded:
            raise ValueError("model must have whole parameters for NormalizedGap, whose averages every process has")
        found = found_inf([*g_l, *g_u], power=4)
        if not len(self.ema_labeled):
            if bool(found):
                return vectors.rebuilt(labeled, [torch.full_like(g, torch.nan) for g in g_l])
            self._start(g_l, g_u)
        mean, fourth = list(self.ema_labeled), list(self.ema_fourth)
        if [ema.shape for ema in mean] != [g.shape for g in g_l]:
            shapes = [[list(tensor.shape) for tensor in tensors] for tensors in (mean, g_l)]
            raise ValueError(f"the averages of {shapes[0]} do not fit gradients of {shapes[1]}; use one rule a layer")
        if any(ema.dtype != _wide(g.dtype) or ema.device != g.device for ema, g in zip(mean, g_l, strict=True)):
            mean, fourth = (
                [ema.to(g.device, _wide(g.dtype)) for ema, g in zip(averages, g_l, strict=True)]
                for averages in (mean, fourth)
            )
            self.ema_labeled.replace(mean)
            self.ema_fourth.replace(fourth)
        # With decays of 1 the operator uses the averages as they are.
        decays = (self.decay, self.decay_norm) if self.include_current else (1.0, 1.0)
        direction = ops.alignment_direction(
            g_l,
            g_u,
            mean,
            fourth,
            decay=decays[0],
            decay_norm=decays[1],
            epsilon=self.epsilon,
            found_inf=found,
        )
        if not self.include_current:
            fresh = torch._foreach_pow(torch._foreach_sub(mean, g_u), 4.0)
            new = torch._foreach_lerp(fourth, fresh, 1 - self.decay_norm)
            new += torch._foreach_lerp(mean, [g.to(_wide(g.dtype)) for g in g_l], 1 - self.decay)
            for average, moved in zip(fourth + mean, new, strict=True):
                average.copy_(torch.where(found != 0, average, moved))
        return vectors.rebuilt(labeled, direction)

    # A compiled graph would leave out the copy, and the averages be the gradients themselves.
    @torch.compiler.disable(reason="the averages of the first step live on after it")
    def _start(self, g_l: list[Tensor], g_u: list[Tensor]) -> None:
        self.ema_labeled.replace([g.to(_wide(g.dtype), copy=True) for g in g_l])
        self.ema_fourth.replace([(ema - g) ** 4 for ema, g in zip(self.ema_labeled, g_u, strict=True)])

    def check_entries(self, state: Mapping[str, Any]) -> tuple[str, ...]:
        """Both averages are of the same tensors."""
        counts = [state.get(f"{name}.count") for name in ("ema_labeled", "ema_fourth")]
        shapes = [
            [getattr(state.get(f"{name}.{place}"), "shape", None) for place in range(int(count or 0))]
            for name, count in zip(("ema_labeled", "ema_fourth"), counts, strict=True)
        ]
        if shapes[0] != shapes[1]:
            raise ValueError(f"ema_fourth must have the shapes of ema_labeled, {shapes[0]}, got {shapes[1]}")
        return ()


def _wide(gradient: torch.dtype) -> torch.dtype:
    """The averages' dtype: a 16-bit one would lose their increments, and v^4 its range."""
    return torch.float64 if gradient == torch.float64 else torch.float32
