"""Trainers of a small net in float64 on random images, a few in a batch."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.data import ImageDataset, KeyedRandom, Split
from fastmeta.data.augment import Plain, Views
from fastmeta.ops.process_group import Group
from fastmeta.ssl import BASES
from fastmeta.training import TrainingData
from fastmeta.training.config import AverageConfig, MachineConfig, OptimizerConfig
from fastmeta.training.processes import Processes
from fastmeta.training.recipes import METHODS, base_of
from fastmeta.training.trainer import Trainer

CLASSES, STEPS = 3, 2
SIZES = {"labeled": 9, "unlabeled": 23, "holdout": 7, "validation": 5, "test": 11}
SETTINGS: dict[str, dict[str, Any]] = {
    "fixmatch": {"threshold": 0.5},
    "pseudo-label": {"threshold": 0.5},
    "flexmatch": {"threshold": 0.5},
    "uda": {"threshold": 0.5, "annealing": "linear", "distribution_alignment": "labels"},
    "mixmatch": {"views": 3, "ramp": 0.0},
    "remixmatch": {"ramp": 0.0, "rotation_weight": 0.5},
}
# FixMatch with every method; every base alone and with a method that fits.
CASES = [("fixmatch", method) for method in METHODS] + [
    (base, method)
    for base, algorithm in BASES.items()
    if base != "fixmatch" and algorithm.task == "classification"
    for method in ("none", "label-gradient-alignment" if base == "vat" else "l2i")
    if method == "none" or algorithm.imputes
]


@dataclass(frozen=True)
class Noise:
    """An augmentation that is keyed by example, in float64."""

    size: float

    def __call__(self, images: Tensor, random: KeyedRandom) -> Tensor:
        noise = random.uniform(images[0].numel()).view_as(images)
        return images.double() + self.size * noise


class Doubled(Plain):
    def __call__(self, images: Tensor, random: KeyedRandom | None = None) -> Tensor:
        return super().__call__(images).double()


class Net(nn.Module):
    """Logits that are large enough for some of the predictions to be confident."""

    def __init__(self, normalized: bool, unused: bool = False) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2) if unused else nn.Identity()
        norm = nn.BatchNorm2d(4) if normalized else nn.GroupNorm(2, 4)
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.Tanh(), nn.Conv2d(4, 6, 3), nn.Tanh(), nn.Flatten())
        self.fc = nn.Linear(24, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(4 * self.body(images.to(self.fc.weight.dtype)))


def data(labeled_batch: int, holdout_batch: int | None = None) -> TrainingData:
    generator = torch.Generator().manual_seed(0)
    count = sum(SIZES.values())
    images = torch.rand(count, 1, 6, 6, generator=generator)
    targets = torch.arange(count) % CLASSES
    places = torch.randperm(count, generator=generator).split(list(SIZES.values()))
    return TrainingData(
        ImageDataset("random", images, targets, CLASSES),
        Split(*places),
        Views(Noise(0.1), Noise(0.5), Doubled(6)),
        labeled_batch=labeled_batch,
        unlabeled_batch=10,
        holdout_batch=holdout_batch,
    )


def trainer(
    base: str,
    method: str,
    group: Group,
    machine: MachineConfig | None = None,
    *,
    normalized: bool = False,
    unused: bool = False,
    tol: float = 1e-12,
    base_settings: Mapping[str, Any] = MappingProxyType({}),
    method_settings: Mapping[str, Any] = MappingProxyType({}),
    optimizer: OptimizerConfig | None = None,
    holdout_batch: int | None = None,
) -> Trainer:
    """At the default ``tol`` rounding does not end a solver an iteration later."""
    torch.manual_seed(1)
    model = Net(normalized, unused).double()
    recipe = METHODS[method]
    solver: dict[str, Any] = {"tol": tol, "damping": 1.0} if "cg" in recipe.settings.values() else {}
    if recipe.settings.get("inverse_hessian") == "cholesky":  # which no CUDA graph can hold
        solver = {"inverse_hessian": "cg", "tol": tol}
    if "interval" in recipe.settings:
        solver["interval"] = 1
    return Trainer(
        model,
        # Of unequal sizes, each process makes its own pairs.
        data(10 if base == "mix-up-consistency" else 6, holdout_batch),
        base=base_of(base, {**SETTINGS.get(base, {}), **base_settings}),
        method=recipe.build(SIZES["unlabeled"], CLASSES, {**solver, **method_settings}, group),
        steps=STEPS,
        optimizer=optimizer or OptimizerConfig(learning_rate=0.1),
        average=AverageConfig(decay=0.9),
        machine=machine,
        processes=Processes(group),
    )
