"""What is timed must be right: in float64, each step's parameter gradients are those of the published form.

The forms begin alike (same weights, images and optimizer), so after a few steps their gradients agree only where the
label gradients of every step did. Dropout is off: the published form draws a new mask for every pass.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bench.step.task import Network, Step, random_batch
from bench.step.variants import Make, StepVariant, variants

TOLERANCE = 1e-9  # relative, over all parameters together
BATCH, PIXELS = 4, 16
STEPS = 3


def errors(network: Network, chosen: Sequence[StepVariant], device: str = "cpu") -> dict[str, float]:
    """By name, each variant's relative error against the published form that it must agree with."""
    wanted = {variant.same_as for variant in chosen}
    published = {v.name: gradients(network, v.make, device) for v in variants() if v.name in wanted}
    return {
        variant.name: relative_error(gradients(network, variant.make, device), published[variant.same_as])
        for variant in chosen
        if variant.same_as
    }


def gradients(network: Network, make: Make, device: str) -> Tensor:
    """The parameters' gradients that the last of a few steps leaves, as one vector in float64."""
    make_small = lambda: without_dropout(network.make())  # noqa: E731 - one name for what follows
    small = dataclasses.replace(network, make=make_small, pixels=PIXELS, labeled=BATCH, unlabeled=BATCH)
    step: Step = make(small, random_batch(small, torch.float64, device))
    for _ in range(STEPS):
        step()
    return torch.cat([gradient.flatten() for gradient in step.gradient().values()])


def relative_error(value: Tensor, reference: Tensor) -> float:
    if value.shape != reference.shape:
        return float("inf")
    return float((value - reference).norm() / reference.norm())


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return model
