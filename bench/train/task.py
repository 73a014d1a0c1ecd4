"""What is trained: the project's own trainer, on generated images in memory."""

from dataclasses import dataclass, replace

import torch

from fastmeta.data import ImageDataset
from fastmeta.presets import PRESETS
from fastmeta.training.build import build
from fastmeta.training.config import MachineConfig, RunConfig, SplitConfig
from fastmeta.training.processes import Processes
from fastmeta.training.recipes import DEFAULT_METHODS
from fastmeta.training.trainer import Trainer

STEPS = 2**20  # of the papers' runs at 32 pixels
ON_IMAGENET = tuple(
    name for name, preset in PRESETS.items() if preset.dataset.startswith("imagenet") and preset.config.method != "none"
)
MOST_IMAGES = 400  # labeled and unlabeled, of a preset's step on one card


@dataclass(frozen=True)
class Task:
    """A net, its batches and its images.

    Args:
        name: of the task.
        config: the run; methods take the place of its own.
        classes: C.
        pixels: side of the stored images.
        methods: those that are measured, the base alone first.
    """

    name: str
    config: RunConfig
    classes: int
    pixels: int
    methods: tuple[str, ...] = DEFAULT_METHODS

    @property
    def batch(self) -> int:
        """Labeled and unlabeled images of a step."""
        return (self.config.labeled_batch or 0) + (self.config.unlabeled_batch or 0)

    def images(self) -> ImageDataset:
        """Noise: as many images of a class as the labels need, and enough unlabeled ones for a batch."""
        labels = (self.config.labels_per_class or 0) + (self.config.split.holdout_per_class or 0)
        each = labels + -(-2 * self.batch // self.classes)
        count = self.classes * each
        generator = torch.Generator().manual_seed(0)
        shape = (count, 3, self.pixels, self.pixels)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        return ImageDataset("generated", images, torch.arange(count) % self.classes, self.classes)

    def trainer(self, method: str, machine: MachineConfig, images: ImageDataset, processes: Processes) -> Trainer:
        settings = self.config.method_settings if method == self.config.method else {}
        config = replace(self.config, method=method, method_settings=settings, machine=machine)
        return build(config, images, processes).trainer


def small(labeled: int, unlabeled: int) -> Task:
    """WRN-28-2 as the papers train it on 32 pixels, in batches of this size."""
    config = RunConfig(
        data="generated",
        labels_per_class=4,
        split=SplitConfig(holdout_per_class=3),
        model="wide-resnet-28-2",
        views="pictures",
        labeled_batch=labeled,
        unlabeled_batch=unlabeled,
        steps=STEPS,
    )
    return Task(f"WRN-28-2, 32 px, {labeled} + {unlabeled}", config, 10, 32)


def of_preset(name: str) -> Task:
    """The preset's own step, with and without its method, on one process's part of its batch."""
    preset = PRESETS[name].config
    processes = 1
    while (preset.labeled_batch or 0) + (preset.unlabeled_batch or 0) > MOST_IMAGES * processes:
        processes *= 2
    parts = {
        batch: size // processes
        for batch in ("labeled_batch", "unlabeled_batch", "holdout_batch")
        if (size := getattr(preset, batch)) is not None
    }
    holdout = 1 if preset.split.holdout_per_class else 0
    config = replace(
        preset, data="generated", labels_per_class=1, split=SplitConfig(holdout_per_class=holdout), **parts
    )
    pixels = preset.image_size or 32
    stored = pixels if pixels <= 96 else round(pixels * 8 / 7)
    return Task(f"{name}, 1/{processes} of its batch", config, 1000, stored, ("none", preset.method))


TASKS = {"cpu": (small(16, 48),), "cuda": (small(64, 448), *map(of_preset, ON_IMAGENET))}
