"""Exponential moving average of a model's weights."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.training.config import AverageConfig
from fastmeta.training.shards import local


class ExponentialMovingAverage:
    """Keeps ``average <- d * average + (1 - d) * weights``; at update t ``d = min(decay, (1 + t) / (delay + t))``.

    The smaller ``d`` of the first updates, ``config.warm_up``, lets the average forget the random initialization.
    Buffers (batch normalization's running statistics) are copied, or averaged as ``config.buffers`` says.

    Args:
        model: the model to follow.
        config: decay and the rest.
    """

    def __init__(self, model: nn.Module, config: AverageConfig) -> None:
        self.config = config
        self.updates = 0
        groups = [layer.process_group for layer in model.modules() if isinstance(layer, nn.SyncBatchNorm)]
        shared = {id(group): group for group in groups}  # by the copies, too: a group cannot be copied
        self.model = copy.deepcopy(model, shared).requires_grad_(False)
        self.follow(model)

    def follow(self, model: nn.Module) -> None:
        """Follow ``model`` from here on, of the same parameters; where they are sharded, those of this process."""
        averages = [local(parameter) for parameter in self.model.parameters()]
        values = [local(parameter) for parameter in model.parameters()]
        copies: list[tuple[Tensor, Tensor]] = []
        for buffer, source in zip(self.model.buffers(), model.buffers(), strict=True):
            if self.config.buffers == "averaged" and buffer.is_floating_point():
                averages.append(buffer)
                values.append(source)
            else:
                copies.append((buffer, source))
        self._averages, self._values, self._copies = averages, values, copies

    @torch.no_grad()
    def update(self) -> None:
        """Take one step towards the followed model's present weights."""
        decay = 0.999 if self.config.decay is None else self.config.decay
        if self.config.warm_up:
            decay = min(decay, (1 + self.updates) / (self.config.delay + self.updates))
        torch._foreach_lerp_(self._averages, self._values, 1 - decay)
        if self._copies:
            torch._foreach_copy_([buffer for buffer, _ in self._copies], [source for _, source in self._copies])
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """The average and the number of updates it has seen."""
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.model.load_state_dict(state["model"])
        self.updates = state["updates"]
