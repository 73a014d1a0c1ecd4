"""Runs of the trainer as cells of an experiment, and what their differences on the same seeds are.

Every run has the settings that were chosen on the digits' validation images (:mod:`fastmeta.training.recipes`), on all
images alike: on the others nothing was chosen, and photographs have the views of pictures, which nobody chose. Each has
20 validation images a class, with which its weights are picked.
"""

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fastmeta.reproduce.experiment import Row
from fastmeta.training.config import RunConfig, from_dict
from fastmeta.training.recipes import BASE_RECIPES
from fastmeta.training.reports.intervals import Interval, mean_and_deviation, t_interval
from fastmeta.training.train import train

STEPS = 1000
SIDE = {"digits": 8, "mnist-5k": 14, "photographs": 16}
"""Pixels that the net sees; by data set."""


def cell(data: str, labels: int, base: str, method: str, seed: int, steps: int = STEPS, **changes: Any) -> Row:
    """The settings of one run; ``changes`` are those of :class:`RunConfig`, nested as in config.json."""
    return {
        "data": data,
        "labels": labels,
        "base": base,
        "method": method,
        "changes": changes,
        "steps": steps,
        "seed": seed,
    }


def config_of(
    data: str, labels: int, base: str, method: str, changes: Mapping[str, Any], steps: int, seed: int
) -> RunConfig:
    """The run of a cell."""
    config = from_dict({**changes, "data": data, "base": base, "method": method, "seed": seed})
    split = replace(
        config.split,
        holdout_per_class=3 if config.split.holdout_per_class is None else config.split.holdout_per_class,
        validation_per_class=20,
        test_fraction=0.0 if data == "photographs" else 0.25,  # that have a test part of their own
    )
    return replace(
        config,
        labels_per_class=labels,
        steps=steps,
        base_settings={**asdict(BASE_RECIPES[base]), **config.base_settings},
        image_size=SIDE[data],
        labeled_batch=config.labeled_batch or 40,
        unlabeled_batch=config.unlabeled_batch or 120,
        labeled_view=config.labeled_view or "strong",
        optimizer=replace(config.optimizer, learning_rate=config.optimizer.learning_rate or 0.2),
        evaluation=replace(config.evaluation, every=config.evaluation.every or max(1, min(50, steps))),
        split=split,
        machine=replace(config.machine, threads=1, channels_last=True),  # a fifth less time on these cores
    )


def measure(**settings: Any) -> Row:
    """The run of a cell."""
    return figures_of(config_of(**settings))


def figures_of(config: RunConfig) -> Row:
    """Errors in percent, by the weights with the least validation error, and the processor's seconds of it all."""
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        results = train(config, Path(folder) / "run")
    assert results is not None
    return {
        "error": round(100 * results["test_error"], 2),
        "validation_error": round(100 * results["validation_error"], 2),
        "cpu_seconds": round(time.process_time() - start, 1),
    }


def arm(row: Row) -> str:
    """Base, method and changes of a run, in words."""
    changes = [f"{name.split('.')[-1]} {value}" for name, value in _flat(row["changes"])]
    steps = [] if row["steps"] in (STEPS, QUICK_STEPS) else [f"{row['steps']} steps"]
    name = row["base"] if row["method"] == "none" else f"{row['base']} + {row['method']}"
    return ", ".join([name, *changes, *steps])


QUICK_STEPS = 3


def by_seed(rows: Sequence[Row], key: str = "error") -> dict[str, dict[int, float]]:
    """A figure of runs on one data set with as many labels, by arm and seed."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        found.setdefault(arm(row), {})[row["seed"]] = row[key]
    return found


def paired(one: Mapping[int, float], other: Mapping[int, float], level: float = 0.95) -> Interval | None:
    """Of ``one - other`` over the seeds that both have; None without any."""
    seeds = sorted(set(one) & set(other))
    return t_interval([one[seed] - other[seed] for seed in seeds], level) if seeds else None


def verdict(difference: Interval | None) -> str:
    """What an interval of a difference in error shows.

    >>> verdict(Interval(-3.0, -5.0, -1.0)), verdict(Interval(-3.0, -7.0, 1.0))
    ('helps', 'no difference shown')
    """
    if difference is None or difference.low is None or difference.high is None:
        return "too few seeds"
    if difference.low <= 0 <= difference.high:
        return "no difference shown"
    return "helps" if difference.high < 0 else "harms"


def interval_text(interval: Interval | None) -> str:
    """Mean and 95% interval in points.

    >>> interval_text(Interval(-3.0, -5.0, -1.0))
    '-3.0 [-5.0, -1.0]'
    """
    if interval is None:
        return ""
    ends = "" if interval.low is None else f" [{interval.low:+.1f}, {interval.high:+.1f}]"
    return f"{interval.mean:+.1f}{ends}"


def mean_text(values: Sequence[float]) -> str:
    """Mean and standard deviation.

    >>> mean_text([1.0, 3.0])
    '2.0 ± 1.4'
    """
    mean, deviation = mean_and_deviation(values)
    return f"{mean:.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")


def comparison(rows: Sequence[Row], baseline: str) -> list[list[object]]:
    """Lines of a table: arm, seeds, error, difference to ``baseline`` on the same seeds, verdict."""
    found = by_seed(rows)
    lines: list[list[object]] = []
    for name, errors in found.items():
        difference = None if name == baseline else paired(errors, found.get(baseline, {}))
        shown = ["", ""] if name == baseline else [interval_text(difference), verdict(difference)]
        lines.append([name, len(errors), mean_text(list(errors.values())), *shown])
    return lines


COLUMNS = ("", "seeds", "test error, %", "difference, points", "")


def of(rows: Sequence[Row], **settings: Any) -> list[Row]:
    """The rows with these settings."""
    return [row for row in rows if all(row[name] == value for name, value in settings.items())]


def median_ratio(rows: Sequence[Row], one: str, other: str) -> float | None:
    """Of the processor's time of two arms on the same seeds."""
    seconds = by_seed(rows, "cpu_seconds")
    first, second = seconds.get(one, {}), seconds.get(other, {})
    ratios = [first[seed] / max(second[seed], 1e-9) for seed in sorted(set(first) & set(second))]
    return statistics.median(ratios) if ratios else None


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in values.items():
        flat += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
    return flat
