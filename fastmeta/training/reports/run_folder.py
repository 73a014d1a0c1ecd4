"""What a run has left in its folder, finished or not."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastmeta.data.landmarks import COORDINATES
from fastmeta.training.files import read_json


@dataclass(frozen=True)
class RunFolder:
    """A run's folder, read.

    Args:
        folder: where it is.
        config: config.json: the resolved settings, and under "record" the data that it was made with.
        results: results.json; None as long as the run is not finished.
        metrics: the lines of metrics.jsonl, one an evaluation.
        timing: the lines of timing.jsonl.
    """

    folder: Path
    config: dict[str, Any]
    results: dict[str, Any] | None
    metrics: list[dict[str, Any]]
    timing: list[dict[str, Any]]

    @property
    def record(self) -> dict[str, Any]:
        """The data: name, fingerprint, classes, sizes of the parts."""
        return self.config["record"]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return tuple(self.record["classes"])

    @property
    def step(self) -> int:
        """Steps that are known to be done: those of the last evaluation."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Channels, height and width of what the images' ``get`` returns."""
        return tuple(self.record["image_shape"])

    @property
    def task(self) -> Literal["images", "texts", "landmarks"]:
        """What the run is on."""
        if self.classes == COORDINATES:
            return "landmarks"
        return "texts" if len(self.image_shape) == 1 else "images"

    @property
    def mode(self) -> str:
        """Pillow's name of the images' colours."""
        return "L" if self.image_shape[0] == 1 else "RGB"

    @property
    def sizes(self) -> dict[str, int]:
        """Images in each part of the split."""
        return self.record.get("sizes", {})

    def unlabeled(self) -> Iterator[dict[str, str]]:
        """The lines of unlabeled.csv: what the run made of each unlabeled image; none if there is no such file."""
        path = self.folder / "unlabeled.csv"
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                yield from csv.DictReader(file)


def read_run(folder: Path) -> RunFolder:
    """Read a run's folder.

    Raises:
        ValueError: it is none.
    """
    config = _object(folder / "config.json")
    if not isinstance(config.get("record"), dict) or "classes" not in config["record"]:
        raise ValueError(f"{folder}: no run of fastmeta train, expected a folder with its config.json")
    results = _object(folder / "results.json") or None
    return RunFolder(folder, config, results, _lines(folder / "metrics.jsonl"), _lines(folder / "timing.jsonl"))


def _object(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    return value if isinstance(value, dict) else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines before the first that cannot be read: a run that was killed may leave half of a last one."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            break
        rows.append(row)
    return rows
