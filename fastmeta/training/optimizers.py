"""Optimizers and learning rates, from their settings."""

import math

import torch
from torch import Tensor, nn

from fastmeta.training.config import OptimizerConfig, ScheduleConfig


def decayed_parameters(model: nn.Module, config: OptimizerConfig) -> list[nn.Parameter]:
    """The trainable parameters that decay: all, or those of more than one dimension."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [parameter for parameter in parameters if config.decayed == "all" or parameter.dim() > 1]


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """SGD or Adam over the trainable parameters; a decoupled decay is left to :func:`decay_`.

    Fused: one whose ``found_inf`` is 1 leaves its step out, and the host need not know.
    """
    decayed = decayed_parameters(model, config)
    known = set(map(id, decayed))
    others = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in known]
    decay = 0.0 if config.decoupled else config.weight_decay
    groups = [{"params": decayed, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if config.name == "adam":
        adam = torch.optim.Adam(groups, lr=config.peak, betas=config.betas, fused=True)
        for parameter in decayed + others:  # torch would make it at the first step: a checkpoint needs it before
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            adam.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
        return adam
    nesterov = config.nesterov and config.momentum > 0
    optimizer = torch.optim.SGD(groups, lr=config.peak, momentum=config.momentum, nesterov=nesterov, fused=True)
    if config.momentum > 0:
        for parameter in (
            decayed + others
        ):  # torch makes them without a value, and a first step that is left out keeps it
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


@torch.no_grad()
def decay_(parameters: list[Tensor], config: OptimizerConfig, learning_rate: float | Tensor) -> None:
    """``w <- w (1 - learning_rate weight_decay)`` if the decay is decoupled."""
    if config.decoupled and config.weight_decay and parameters:
        torch._foreach_mul_(parameters, 1 - learning_rate * config.weight_decay)


def rate_at(config: ScheduleConfig, step: int, steps: int) -> float:
    """The factor of the peak learning rate at step ``step`` of ``steps``.

    >>> [round(rate_at(ScheduleConfig("cosine-7/16"), step, 10), 3) for step in (0, 5, 9)]
    [1.0, 0.773, 0.328]
    >>> [rate_at(ScheduleConfig("steps", warm_up=2, milestones=(4,)), step, 8) for step in (0, 1, 2, 4)]
    [0.5, 1.0, 1.0, 0.1]
    """
    progress = step / steps
    warm = min(1.0, (step + 1) / config.warm_up) if config.warm_up else 1.0
    if config.name == "cosine-7/16":
        return warm * math.cos(7 / 16 * math.pi * progress)
    if config.name == "cosine":
        return warm * (1 + math.cos(math.pi * progress)) / 2
    if config.name == "steps":
        return warm * config.factor ** sum(step >= milestone for milestone in config.milestones)
    return warm
