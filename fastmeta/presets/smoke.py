"""A few steps of a preset on generated images, to see that a machine can run it before the real data are there."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastmeta.data.generated import WRITERS
from fastmeta.presets.preset import Preset
from fastmeta.training.config import RunConfig, SplitConfig
from fastmeta.training.train import train

STEPS = 2
_BATCH = 2
_DRAWN = 20  # images of a part that is drawn without regard to classes


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
        WRITERS[preset.dataset](data)
        found = train(small(preset.config, f"{preset.dataset}:{data}"), out or Path(name) / "run")
        assert found is not None, "nobody stopped it"
        return found


def small(config: RunConfig, data: str) -> RunConfig:
    """The run on these data that takes seconds."""
    ratio = (config.unlabeled_batch or 1) // (config.labeled_batch or 1)
    settings = dict(config.method_settings)
    if config.method.startswith("example-weights"):
        settings["interval"] = STEPS
    if settings.get("inverse_hessian") == "neumann":
        settings["max_iter"] = 2
    return replace(
        config,
        data=data,
        labels_per_class=config.labels_per_class and 1,
        split=_small_split(config.split),
        labeled_batch=_BATCH,
        unlabeled_batch=_BATCH * min(ratio, 2),
        holdout_batch=config.holdout_batch and 2 * _BATCH,
        method_settings=settings,
        steps=STEPS,
        schedule=replace(
            config.schedule, warm_up=min(1, config.schedule.warm_up), milestones=config.schedule.milestones and (1,)
        ),
        evaluation=replace(config.evaluation, every=STEPS),
    )


def _small_split(split: SplitConfig) -> SplitConfig:
    """A few images in each part that the preset draws."""
    sizes: dict[str, Any] = {"holdout_per_class": 1, "validation_per_class": 1, "holdout": _DRAWN, "validation": _DRAWN}
    return replace(split, **{part: getattr(split, part) and size for part, size in sizes.items()})
