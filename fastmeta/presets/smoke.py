"""A few steps of a preset on generated images, to see that a machine can run it before the real data are there."""

import io
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastmeta.training.config import RunConfig, SplitConfig
from fastmeta.training.train import train

CLASSES = 20  # from here on runs report the five likeliest classes, too
TRAIN, VALIDATION = 6, 2  # images of a class
STEPS = 4
_SEED = 0


def run_smoke(config: RunConfig, out: Path | None = None) -> dict[str, dict[str, Any]]:
    """Train the preset for :data:`STEPS` steps on generated JPEGs, from a folder and from parquet shards.

    Net, image size, base, method and optimizer are the preset's; batches, steps, schedule and labels are tiny.

    Args:
        config: the preset.
        out: folder for the two runs; None: a temporary one.

    Returns:
        The results of each run by the layout of its data; without pyarrow the folder's alone.
    """
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="fastmeta-smoke-") as name:
        writers = {"folder": write_folder, "parquet": write_parquet}
        if not _has_pyarrow():
            del writers["parquet"]
        for layout, write in writers.items():
            data = Path(name) / layout
            write(data, config.image_size or 32)
            found = train(small(config, str(data)), (out or Path(name) / "runs") / layout)
            assert found is not None, "nobody stopped it"
            results[layout] = found
    return results


def small(config: RunConfig, data: str) -> RunConfig:
    """The run on these data that takes seconds."""
    ratio = (config.unlabeled_batch or 1) // (config.labeled_batch or 1)
    settings = dict(config.method_settings)
    if "interval" in settings:
        settings["interval"] = 2
    return replace(
        config,
        data=data,
        labels_per_class=2,
        split=SplitConfig(holdout_per_class=1) if config.split.holdout_per_class else config.split,
        labeled_batch=4,
        unlabeled_batch=4 * min(ratio, 3),
        holdout_batch=None if config.holdout_batch is None else 8,
        method_settings=settings,
        steps=STEPS,
        schedule=replace(
            config.schedule, warm_up=min(1, config.schedule.warm_up), milestones=config.schedule.milestones and (2, 3)
        ),
        evaluation=replace(config.evaluation, every=STEPS // 2),
    )


def write_folder(folder: Path, side: int) -> None:
    """``train/<class>/*.jpg`` and ``val/<class>/*.jpg``, as ImageNet's archives unpack."""
    for part, label, number, image in _images(side):
        place = folder / {"train": "train", "validation": "val"}[part] / _name(label)
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.JPEG").write_bytes(image)


def write_parquet(folder: Path, side: int) -> None:
    """``train-00000-of-00002.parquet`` and so on, in the schema of the Hugging Face hub."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(parents=True)
    names = [_name(label) for label in range(CLASSES)]
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    for part, shards in (("train", 2), ("validation", 1)):
        rows = [
            ({"bytes": image, "path": f"{label}-{number}.JPEG"}, label)
            for of, label, number, image in _images(side)
            if of == part
        ]
        for shard in range(shards):
            images, labels = zip(*rows[shard::shards], strict=True)
            table = pyarrow.table({"image": list(images), "label": list(labels)}).replace_schema_metadata(metadata)
            pyarrow.parquet.write_table(table, folder / f"{part}-{shard:05}-of-{shards:05}.parquet")


def _images(side: int) -> Iterator[tuple[str, int, int, bytes]]:
    """Part, class, number and JPEG of each image: a color of its class, noise, and sides that differ."""
    draw = np.random.default_rng(_SEED)
    colors = draw.integers(40, 216, (CLASSES, 3))
    for part, count in (("train", TRAIN), ("validation", VALIDATION)):
        for label in range(CLASSES):
            for number in range(count):
                height, width = (round(side * factor) for factor in draw.uniform(0.9, 1.5, 2))
                pixels = colors[label] + draw.integers(-40, 40, (height, width, 3))
                file = io.BytesIO()
                Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG")
                yield part, label, number, file.getvalue()


def _name(label: int) -> str:
    return f"n{label:08}"


def _has_pyarrow() -> bool:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        return False
    return True
