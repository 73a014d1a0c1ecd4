"""A few steps of a preset on generated images, to see that a machine can run it before the real data are there."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastmeta.presets.data import DATA_SETS
from fastmeta.presets.preset import Preset
from fastmeta.training.config import RunConfig, SplitConfig
from fastmeta.training.train import train

TRAIN, VALIDATION = 6, 2  # images of a class
STEPS = 2
_SEED = 0


def run_smoke(preset: Preset, out: Path | None = None) -> dict[str, Any]:
    """Train the preset for :data:`STEPS` steps on generated images in its data set's format.

    Net, image size, views, base, method and optimizer are the preset's; batches, steps, schedule and split are tiny.

    Args:
        preset: to be run.
        out: folder for the run; None: a temporary one.

    Returns:
        The results of the run.
    """
    with tempfile.TemporaryDirectory(prefix="fastmeta-smoke-") as name:
        data = Path(name) / "data"
        write_folder(data, DATA_SETS[preset.dataset].classes, preset.config.image_size or 32)
        found = train(small(preset.config, str(data)), out or Path(name) / "run")
        assert found is not None, "nobody stopped it"
        return found


def small(config: RunConfig, data: str) -> RunConfig:
    """The run on these data that takes seconds."""
    ratio = (config.unlabeled_batch or 1) // (config.labeled_batch or 1)
    settings = dict(config.method_settings)
    if "interval" in settings:
        settings["interval"] = STEPS
    return replace(
        config,
        data=data,
        labels_per_class=config.labels_per_class and 1,
        split=_split(config.split),
        labeled_batch=2,
        unlabeled_batch=2 * min(ratio, 2),
        holdout_batch=config.holdout_batch and 4,
        method_settings=settings,
        steps=STEPS,
        schedule=replace(
            config.schedule, warm_up=min(1, config.schedule.warm_up), milestones=config.schedule.milestones and (1,)
        ),
        evaluation=replace(config.evaluation, every=STEPS),
    )


def _split(split: SplitConfig) -> SplitConfig:
    """One image of a class in each part that the preset draws."""
    return replace(
        split,
        holdout_per_class=split.holdout_per_class and 1,
        validation_per_class=split.validation_per_class and 1,
    )


def write_folder(folder: Path, classes: int, side: int) -> None:
    """``train/<class>/*.jpg`` and ``val/<class>/*.jpg``: a color of its class, noise, and sides that differ."""
    draw = np.random.default_rng(_SEED)
    colors = draw.integers(40, 216, (classes, 3))
    for part, count in (("train", TRAIN), ("val", VALIDATION)):
        for label in range(classes):
            place = folder / part / f"n{label:08}"
            place.mkdir(parents=True)
            for number in range(count):
                height, width = (round(side * factor) for factor in draw.uniform(0.9, 1.5, 2))
                pixels = colors[label] + draw.integers(-40, 40, (height, width, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number}.JPEG")
