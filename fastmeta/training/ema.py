"""Exponential moving average of a model's weights."""

import copy

import torch
from torch import Tensor, nn


class ExponentialMovingAverage:
    """Keeps ``average <- d * average + (1 - d) * weights``, ``d = min(decay, (1 + t) / (10 + t))`` at update ``t``.

    The smaller ``d`` of the first updates lets the average forget the random initialization. Buffers (batch
    normalization's running statistics) are copied, not averaged.

    Args:
        model: the model to follow.
        decay: in [0, 1); the average remembers about ``1 / (1 - decay)`` updates.

    Raises:
        ValueError: ``decay`` is not in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self.updates = 0
        self.model = copy.deepcopy(model).requires_grad_(False)
        self._average: list[Tensor] = list(self.model.parameters())
        self._weights: list[Tensor] = list(model.parameters())
        self._buffers = list(zip(self.model.buffers(), model.buffers(), strict=True))

    @torch.no_grad()
    def update(self) -> None:
        """Take one step towards the followed model's present weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self._average, self._weights, 1 - decay)
        for buffer, source in self._buffers:
            buffer.copy_(source)
        self.updates += 1

    def state_dict(self) -> dict[str, object]:
        """The average and the number of updates it has seen."""
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict) -> None:
        """Continue from :meth:`state_dict`."""
        self.model.load_state_dict(state["model"])
        self.updates = state["updates"]
