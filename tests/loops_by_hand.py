"""What tests of whole loops share: a run of the trainer, and steps of an optimizer by hand."""

import math
from collections.abc import Callable
from typing import Any

import torch
from small_trainers import STEPS, trainer
from torch import Tensor, nn
from torch.func import functional_call

from fastmeta.ssl import TrainingBatch
from fastmeta.training.trainer import Trainer

Parameters = dict[str, Tensor]


def rate(step: int, peak: float) -> float:
    """The learning rate of each step: cos(7 pi k / 16 K)."""
    return peak * math.cos(7 * math.pi * step / (16 * STEPS))


def leaves(model: nn.Module) -> Parameters:
    return {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}


def at(model: nn.Module, parameters: Parameters, images: Tensor) -> Tensor:
    """Logits by batch statistics; running ones stay."""
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    return functional_call(model, {**parameters, **buffers}, (images,))


def updated(optimizer: torch.optim.Optimizer, model: nn.Module, gradients: Any, lr: float) -> None:
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient.detach()
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()


def stepped(optimizer: torch.optim.Optimizer, model: nn.Module, loss: Tensor, lr: float) -> None:
    updated(optimizer, model, torch.autograd.grad(loss, list(model.parameters())), lr)


def assert_same_parameters(found: nn.Module, wanted: nn.Module, rtol: float = 1e-8, atol: float = 1e-10) -> None:
    for name, value in wanted.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), value, rtol=rtol, atol=atol, msg=name)


def run_of(
    base: str, method: str, *, steps: int = STEPS, **settings: Any
) -> tuple[Trainer, nn.Module, Callable[[int], TrainingBatch]]:
    """A run after its steps, the model it began with, and the data of each step."""
    run, same = (trainer(base, method, None, **settings) for _ in range(2))
    for _ in range(steps):
        run.train_step()
    assert run.skipped.tolist() == [0, 0]
    return run, same.model.train(), same.batches
