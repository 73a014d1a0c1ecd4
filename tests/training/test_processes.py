"""Training on 2, 3 and 4 processes, whose batches do not divide evenly, is that of one process on the same batches.

In float64, so that what is left is rounding; without batch statistics, which are each process's own.
"""

from dataclasses import dataclass
from typing import Any

import forked
import pytest
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
WORLDS = (2, 3, 4)
SIZES = {"labeled": 9, "unlabeled": 23, "holdout": 7}
SOLVED = {"tol": 1e-12, "damping": 1.0}  # or rounding could end a solver an iteration later
# FixMatch with every method; every base alone and with a method that fits.
CASES = [("fixmatch", method) for method in METHODS] + [
    (base, method)
    for base in BASES
    if base != "fixmatch"
    for method in ("none", "label-gradient-alignment" if base == "vat" else "l2i")
    if method == "none" or BASES[base].imputes
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

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv2d(4, 6, 3), nn.Tanh(), nn.Flatten()
        )
        self.fc = nn.Linear(24, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(4 * self.body(images))


def data(labeled_batch: int) -> TrainingData:
    generator = torch.Generator().manual_seed(0)
    count = sum(SIZES.values())
    images = torch.rand(count, 1, 6, 6, generator=generator)
    targets = torch.arange(count) % CLASSES
    labeled, unlabeled, holdout = torch.randperm(count, generator=generator).split(list(SIZES.values()))
    nothing = torch.arange(0)
    return TrainingData(
        ImageDataset("random", images, targets, CLASSES),
        Split(labeled, unlabeled, holdout, nothing, nothing),
        Views(Noise(0.1), Noise(0.5), Doubled(6)),
        labeled_batch=labeled_batch,
        unlabeled_batch=9,
    )


def trainer(base: str, method: str, group: Group, machine: MachineConfig | None = None) -> Trainer:
    torch.manual_seed(1)
    model = Net().double()
    recipe = METHODS[method]
    settings = {"threshold": 0.5} if base in ("fixmatch", "pseudo-label") else {}
    return Trainer(
        model,
        data(9 if base == "mix-up-consistency" else 6),  # of unequal sizes, each process makes its own pairs
        base=base_of(base, settings),
        method=recipe.build(SIZES["unlabeled"], CLASSES, SOLVED if "cg" in recipe.settings.values() else {}, group),
        uses_holdout=recipe.uses_holdout,
        steps=STEPS,
        optimizer=OptimizerConfig(learning_rate=0.1),
        average=AverageConfig(decay=0.9),
        machine=machine,
        processes=Processes(group),
    )


def trained(group: Group, base: str, method: str) -> dict[str, Any]:
    """What a run of some steps leaves."""
    run = trainer(base, method, group)
    for _ in range(STEPS):
        run.train_step()
    averages = run.averages()
    state = {**run.state_dict(), "sums": averages}
    if method != "none":
        state["method"].pop("direction.solver.numbers", None)  # iterations, and how well it went
    return state


def all_cases(group: Group) -> dict[str, Any]:
    return {f"{base} + {method}": trained(group, base, method) for base, method in CASES}


def assert_alike(found: Any, wanted: Any, name: str) -> None:
    if isinstance(wanted, Tensor):
        assert found.shape == wanted.shape, name
        tolerance = 1e-10 if wanted.dtype == torch.float64 else 1e-6
        difference = float((found.double() - wanted.double()).abs().max()) if wanted.numel() else 0.0
        assert difference <= tolerance * max(1.0, float(wanted.double().abs().max() if wanted.numel() else 0)), (
            f"{name}: {difference:.1e}"
        )
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), name
        for key, value in wanted.items():
            assert_alike(found[key], value, f"{name}, {key}")
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted), name
        for place, value in enumerate(wanted):
            assert_alike(found[place], value, f"{name}, {place}")
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, abs=1e-6), name
    else:
        assert found == wanted, name


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    found = all_cases(None)
    for base in ("fixmatch", "pseudo-label"):
        assert 0.1 < found[f"{base} + l2i"]["sums"]["confident"] < 0.9  # or there is little to compare
    return found


@pytest.mark.parametrize("world", WORLDS)
def test_every_method_on_processes_is_that_of_one(alone: dict[str, Any], world: int) -> None:
    wrong = []
    for rank, found in enumerate(forked.run(all_cases, world)):
        for name, wanted in alone.items():
            try:
                assert_alike(found[name], wanted, f"process {rank}, {name}")
            except AssertionError as error:
                wrong.append(str(error))
    assert not wrong, "\n".join(wrong)
