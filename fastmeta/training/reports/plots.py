"""Plots of a comparison; they need matplotlib."""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastmeta.training.build import load_images
from fastmeta.training.config import from_dict
from fastmeta.training.files import read_json, read_jsonl
from fastmeta.training.reports.drawing import pyplot, save, style
from fastmeta.training.reports.intervals import t_interval

# Color-blind safe (Okabe and Ito); the base is black, a variant has its method's color and a line of its own.
_STYLES = {
    "none": ("#000000", "-"),
    "l2i": ("#0072B2", "-"),
    "meta-gradient": ("#E69F00", "-"),
    "example-weights": ("#009E73", "-"),
    "label-gradient-alignment": ("#CC79A7", "-"),
    "aligned-imputation": ("#D55E00", "-"),
    "implicit-imputation": ("#56B4E9", "-"),
    "impute-and-weight": ("#8C8C00", "-"),
    "learning-to-reweight": ("#009E73", ":"),
    "meta-weight-net": ("#009E73", "-."),
    "l2i-alternating": ("#0072B2", "--"),
    "l2i-jvp": ("#0072B2", ":"),
    "l2i-jvp-alternating": ("#0072B2", "-."),
    "meta-gradient-jvp": ("#E69F00", ":"),
    "meta-gradient-finite-difference": ("#E69F00", "-."),
    "l2i-published": ("#56B4E9", "--"),
    "meta-gradient-published": ("#E69F00", "--"),
    "example-weights-published": ("#009E73", "--"),
    "label-gradient-alignment-published": ("#CC79A7", "--"),
}
_OTHER_STYLE = ("#7F7F7F", "--")
Details = dict[tuple[str, str, int], dict[str, Any]]  # by base, method, seed
_RIGHT, _WRONG = "#009E73", "#D55E00"


def write_plots(folder: Path) -> list[Path]:
    """Draw what ``folder`` holds, finished or partial.

    Returns:
        The files written: errors.png, differences.png, weights.png, labels.png, as far as there is something to show.

    Raises:
        ImportError: matplotlib is not installed.
    """
    pyplot()
    results = read_json(folder / "results.json")
    details = {
        (run["base"], run["method"], run["seed"]): read_json(
            folder / "runs" / run["base"] / run["method"] / f"seed-{run['seed']}" / "details.json"
        )
        for run in results["runs"]
    }
    drawn = [
        _errors(folder, read_jsonl(folder / "metrics.jsonl")),
        _differences(folder, results),
        _weights(folder, details),
        _labels(folder, details),
    ]
    return [path for path in drawn if path is not None]


def _errors(folder: Path, rows: list[dict[str, Any]]) -> Path | None:
    """Test error of the averaged weights over steps, a panel for each method: mean of the seeds, and their range.

    Each panel has the base alone, too, in black.
    """
    if not rows:
        return None
    curves: dict[tuple[str, str], dict[int, list[float]]] = {}
    for row in rows:
        by_step = curves.setdefault((row["base"], row["method"]), {})
        by_step.setdefault(row["step"], []).append(100 * row["test_error_average"])
    bases = list(dict.fromkeys(base for base, _ in curves))
    methods = [name for name in dict.fromkeys([*_STYLES, *(name for _, name in curves)]) if name != "none"]
    panels = {base: [name for name in methods if (base, name) in curves] or ["none"] for base in bases}
    places = [(base, name) for base in bases for name in panels[base]]
    columns = max(map(len, panels.values())) if len(bases) > 1 else min(4, len(places))
    lines = len(bases) if len(bases) > 1 else math.ceil(len(places) / columns)
    figure, grid = pyplot().subplots(
        lines,
        columns,
        figsize=(1.2 + 2.7 * columns, 0.6 + 2.4 * lines),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes in grid.flat:
        axes.set_visible(False)
    for number, (base, method) in enumerate(places):
        line = bases.index(base) if len(bases) > 1 else number // columns
        column = panels[base].index(method) if len(bases) > 1 else number % columns
        axes = grid[line][column]
        axes.set_visible(True)
        style(axes)
        for name in dict.fromkeys(["none", method]):
            if (base, name) in curves:
                _curve(axes, curves[base, name], name)
        axes.set_title(base if method == "none" else f"{base} + {method}", fontsize="small")
        axes.tick_params(labelbottom=True, labelleft=column == 0)
    grid[0][0].set_ylim(bottom=0)  # all panels share their axes
    grid[0][0].set_xlim(left=0)
    figure.supxlabel("training step", fontsize="medium")
    figure.supylabel("test error, %", fontsize="medium")
    title = "averaged weights: mean and range of the seeds"
    if any(method != "none" and (base, "none") in curves for base, method in places):
        title += (" " if columns > 1 else "\n") + "(black: the base alone)"
    figure.suptitle(title, fontsize="medium")
    return save(figure, folder / "errors.png")


def _curve(axes: Any, by_step: dict[int, list[float]], method: str) -> None:
    color, line = _STYLES.get(method, _OTHER_STYLE)
    steps = sorted(by_step)
    means = [sum(by_step[step]) / len(by_step[step]) for step in steps]
    low, high = ([of(by_step[step]) for step in steps] for of in (min, max))
    if len(steps) == 1:  # a line of one point is not drawn
        axes.errorbar(steps, means, [[means[0] - low[0]], [high[0] - means[0]]], fmt="o", color=color, capsize=3)
        return
    axes.plot(steps, means, color=color, linestyle=line, linewidth=1.8)
    axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)


def _differences(folder: Path, results: dict[str, Any]) -> Path | None:
    """Test error minus the base's: one dot per seed, mean and 95% interval."""
    runs = {(run["base"], run["method"], run["seed"]): run["test_error"] for run in results["runs"]}
    arms = [(row["base"], row["method"]) for row in results["table"] if row["difference"] is not None]
    if not arms:
        return None
    several = len({base for base, _ in arms}) > 1
    figure, axes = pyplot().subplots(figsize=(6.8, 1.3 + 0.5 * len(arms)), layout="constrained")
    style(axes)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="0.9", linewidth=0.8)
    axes.axvline(0, color="0.3", linewidth=1)
    for place, (base, method) in enumerate(arms):
        seeds = sorted(seed for b, m, seed in runs if (b, m) == (base, method) and (base, "none", seed) in runs)
        values = [100 * (runs[base, method, seed] - runs[base, "none", seed]) for seed in seeds]
        interval = t_interval(values)
        color, line = _STYLES.get(method, _OTHER_STYLE)
        if interval.low is not None and interval.high is not None:
            ends = [interval.low, interval.high]
            axes.plot(ends, [place, place], color=color, linestyle=line, linewidth=2, alpha=0.5)
        axes.plot(values, [place] * len(values), "o", color=color, markersize=5, alpha=0.7)
        axes.plot(interval.mean, place, "|", color=color, markersize=18, markeredgewidth=3)
    # An interval of two or three seeds can be far wider than anything measured; the table has its ends.
    reach = max(
        abs(100 * (runs[base, method, seed] - runs[base, "none", seed]))
        for base, method, seed in runs
        if method != "none" and (base, "none", seed) in runs
    )
    axes.set_xlim(-2.5 * reach - 1, 2.5 * reach + 1)
    axes.set_yticks(range(len(arms)), [f"{base} + {method}" if several else method for base, method in arms])
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_xlabel(
        "test error minus the base's on the same seed, percentage points\n(dots: seeds; bar: mean; line: 95% interval)"
    )
    axes.set_title("left of 0: the method helps" + ("" if several else f" {arms[0][0]}"), fontsize="medium")
    return save(figure, folder / "differences.png")


def _weights(folder: Path, details: Details) -> Path | None:
    """Histograms of the final example weights, a column for each method, all seeds together.

    Images whose imputed label is right and wrong are apart.
    """
    arms: dict[str, dict[bool, list[float]]] = {}
    for (base, method, _), detail in details.items():
        if detail["weights"] is not None:
            by_outcome = arms.setdefault(f"{base} + {method}", {True: [], False: []})
            for weight, label, target in zip(detail["weights"], detail["imputed"], detail["target"], strict=True):
                by_outcome[label == target].append(weight)
    if not arms:
        return None
    figure, grid = pyplot().subplots(
        2, len(arms), figsize=(1 + 4.4 * len(arms), 4.6), sharex=True, squeeze=False, layout="constrained"
    )
    for column, (arm, by_outcome) in enumerate(arms.items()):
        for axes, right in zip(grid[:, column], (True, False), strict=True):
            weights = by_outcome[right]
            style(axes)
            share = [100 / max(1, len(weights))] * len(weights)
            axes.hist(weights, bins=40, range=(0, 2), color=_RIGHT if right else _WRONG, weights=share)
            axes.axvline(1, color="0.3", linewidth=1, linestyle=":")
            mean = sum(weights) / len(weights) if weights else math.nan
            outcome = "right" if right else "wrong"
            title = f"label imputed at the end is {outcome}: {len(weights)} images, mean {mean:.2f}"
            axes.set_title(f"{arm}\n{title}" if right else title, fontsize="small")
            axes.set_ylabel("% of them" if column == 0 else "")
    figure.supxlabel("weight of an unlabeled image at the end (1 at the start)", fontsize="medium")
    return save(figure, folder / "weights.png")


@dataclass(frozen=True)
class _Change:
    image: int  # place in the dataset
    before: int
    after: int
    confidence_before: float
    confidence_after: float
    target: int

    @property
    def is_right(self) -> bool:
        return self.after == self.target

    @property
    def title(self) -> str:
        confidences = f"{self.confidence_before:.2f} → {self.confidence_after:.2f}"
        return f"{self.before} → {self.after}, true {self.target}\n{confidences}"


def _labels(folder: Path, details: Details, columns: int = 8) -> Path | None:
    """For each method the images of the first seed whose labels changed most: before, after, true."""
    rows: dict[str, list[_Change]] = {}
    for (base, method, seed), detail in details.items():
        if method == "none" or any(name.startswith(f"{base} + {method}:") for name in rows):
            continue
        changes = _by_method(detail)
        title = f"{base} + {method}: imputed label → what the method made of it"
        if not changes and (base, "none", seed) in details:
            changes = _against_base(detail, details[base, "none", seed])
            title = f"{base} + {method}: label imputed at the end by the base alone → with the method"
        if changes:
            rows[title] = changes[:columns]
    if not rows:
        return None
    images = load_images(from_dict(read_json(folder / "config.json")["runs"][0]))
    if len(images.image_shape) != 3:  # texts
        return None
    figure = pyplot().figure(figsize=(1.15 * columns, 2.1 * len(rows)), layout="constrained")
    strips = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for (title, changes), strip in zip(rows.items(), strips, strict=True):
        strip.suptitle(title, x=0.01, horizontalalignment="left", fontweight="bold", fontsize=9)
        for change, axes in itertools.zip_longest(changes, strip.subplots(1, columns)):
            axes.set_axis_off()
            if change is not None:
                picture = images.get(torch.tensor([change.image]))[0].permute(1, 2, 0)
                if picture.shape[2] == 1:
                    axes.imshow(picture[..., 0], cmap="gray_r", vmin=0, vmax=255 if picture.dtype == torch.uint8 else 1)
                else:
                    axes.imshow(picture)
                axes.set_title(change.title, fontsize=8, color=_RIGHT if change.is_right else _WRONG)
    return save(figure, folder / "labels.png")


def _by_method(detail: dict[str, Any]) -> list[_Change]:
    """The changes that the method itself made, largest first."""
    return [
        _Change(
            image=detail["unlabeled"][row["index"]],
            before=row["before"],
            after=row["after"],
            confidence_before=row["confidence_before"],
            confidence_after=row["confidence_after"],
            target=detail["target"][row["index"]],
        )
        for row in detail["refinements"]
    ]


def _against_base(detail: dict[str, Any], alone: dict[str, Any]) -> list[_Change]:
    """For a method that leaves labels alone and moves the imputer: another label at the end, most confident first."""
    places = [place for place, label in enumerate(detail["imputed"]) if label != alone["imputed"][place]]
    places.sort(key=lambda place: -(detail["confidence"][place] + alone["confidence"][place]))
    return [
        _Change(
            image=detail["unlabeled"][place],
            before=alone["imputed"][place],
            after=detail["imputed"][place],
            confidence_before=alone["confidence"][place],
            confidence_after=detail["confidence"][place],
            target=detail["target"][place],
        )
        for place in places
    ]
