"""Two ablations of Learning to Impute (journal version, Section 5.4), on small images and a small net.

``l2i-exact-vs-approx``: the whole model moves, exactly (forward mode), or its last layer alone, Eq. (6). The paper has
mean teacher alone, because the exact rule takes long there; FixMatch is beside it here. ``l2i-holdout``: hold-out
batches of several sizes, drawn from the labeled images, or from two of the five labels a class that training then does
not see, as in the paper: the same fifty images, and the same unlabeled and validation images.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastmeta.data import Images, Split
from fastmeta.data.split_file import written
from fastmeta.reproduce import runs
from fastmeta.reproduce.experiment import Experiment, Row, markdown
from fastmeta.training.build import load_images, resolve, split_of
from fastmeta.training.config import SplitConfig
from fastmeta.training.reports.drawing import pyplot, style
from fastmeta.training.reports.intervals import Interval

EXACT, APPROXIMATE = "l2i-jvp", "l2i"
BASES = ("mean-teacher", "fixmatch")
PLACES = (("digits", 1), ("digits", 4), ("mnist-5k", 4))


def exact_cells(quick: bool) -> list[Row]:
    """All arms on a seed before the next seed."""
    places, bases, seeds = (PLACES[:1], BASES[:1], range(2)) if quick else (PLACES, BASES, range(8))
    return [
        runs.cell(data, labels, base, method, seed, runs.QUICK_STEPS if quick else runs.STEPS)
        for seed in seeds
        for data, labels in places
        for base in bases
        for method in ("none", EXACT, APPROXIMATE)
    ]


def exact_table(rows: Sequence[Row]) -> str:
    """Exact and approximate, and both against the base."""
    lines: list[list[object]] = []
    for data, labels in PLACES:
        here = runs.of(rows, data=data, labels=labels)
        found = runs.by_seed(here)
        for base in BASES:
            exact, approximate = f"{base} + {EXACT}", f"{base} + {APPROXIMATE}"
            if not all(name in found for name in (base, exact, approximate)):
                continue
            ratio = runs.median_ratio(here, approximate, exact)
            lines.append(
                [
                    f"{data}, {labels} a class, {base}",
                    len(found[exact]),
                    *(runs.mean_text(list(found[name].values())) for name in (base, exact, approximate)),
                    _told(runs.paired(found[approximate], found[exact]), "approximate is better", "exact is better"),
                    "" if ratio is None else f"{ratio:.2f}",
                ]
            )
    columns = ["test error, %", "seeds", "base", "exact", "approximate", "approximate - exact", "time of it, ratio"]
    return (
        f"{markdown(columns, lines)}\n\nThe difference is on the same seeds, with its 95% interval, in points. In the "
        "paper neither is better throughout (-1.8 to +1.0 points). The time is the processor's of the whole run, "
        "evaluation included. The exact rule is forward mode here, which holds no graph of second order.\n\n"
        + markdown(
            ["the paper (mean teacher)", "exact", "approximate"],
            [
                ["CIFAR-10, 250 / 500 / 1000 labels", "27.72 / 21.05 / 14.93", "25.97 / 21.13 / 15.76"],
                ["CIFAR-100, 500 / 1000 / 2000", "69.57 / 59.25 / 51.68", "70.58 / 58.96 / 51.95"],
                ["time", "1", "about 0.5"],
            ],
        )
    )


SIZES = (20, 40, 80)
LABELS, SEPARATE = 5, 2  # labels a class; of which so many are for the hold-out set alone
PAPER_SIZES = "32, 64, 128: 44.67 ± 0.23, 44.97 ± 0.13, 45.78 ± 0.40"
SAYS = {  # the paper's differences on CIFAR-100, FixMatch; of the sizes half and twice that of training
    f"joint, hold-out batch {SIZES[0]}": "-0.3",
    f"joint, hold-out batch {SIZES[2]}": "+0.8",
    f"separate, {LABELS - SEPARATE} + {SEPARATE} labels a class": "+0.3 / 0.0 / 0.0",
}


def holdout_cells(quick: bool) -> list[Row]:
    """All arms on a seed before the next seed."""
    names, seeds = (["digits"], range(2)) if quick else (["digits", "mnist-5k"], range(8))
    steps = runs.QUICK_STEPS if quick else runs.STEPS
    together: dict[str, Any] = {"split": {"holdout_per_class": 0}}  # the hold-out labels are among the five
    found = []
    for seed in seeds:
        for data in names:
            found.append(runs.cell(data, LABELS, "fixmatch", "none", seed, steps, **together))
            for size in SIZES:
                joint: dict[str, Any] = {"method_settings": {"holdout": "labeled"}, "holdout_batch": size}
                found.append(runs.cell(data, LABELS, "fixmatch", "l2i", seed, steps, **joint, **together))
            apart: dict[str, Any] = {"method_settings": {"holdout": "part"}}
            found.append(runs.cell(data, LABELS, "fixmatch", "l2i", seed, steps, **apart, **together))
    return found


def measure_holdout(**settings: Any) -> Row:
    """The run of a cell; with a separate hold-out set the last labels of each class are moved there."""
    config = runs.config_of(**settings)
    if settings["changes"].get("method_settings", {}).get("holdout") != "part":
        return runs.figures_of(config)
    images = load_images(config)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "split.json"
        path.write_text(json.dumps(written(images, set_apart(images, split_of(resolve(config, images), images)))))
        return runs.figures_of(replace(config, split=SplitConfig(file=str(path))))


def set_apart(images: Images, split: Split) -> Split:
    """The same, but for the last two labeled images of each class, which are hold-out images."""
    kept, moved = [], []
    for label in range(len(images.classes)):
        members = split.labeled[images.targets[split.labeled] == label]
        kept.append(members[:-SEPARATE])
        moved.append(members[-SEPARATE:])
    return replace(split, labeled=torch.cat(kept), holdout=torch.cat(moved))


def holdout_arm(row: Row) -> str:
    """In words."""
    if row["method"] == "none":
        return "FixMatch alone"
    if row["changes"]["method_settings"]["holdout"] == "part":
        return f"separate, {LABELS - SEPARATE} + {SEPARATE} labels a class"
    return f"joint, hold-out batch {row['changes']['holdout_batch']}"


def holdout_table(rows: Sequence[Row]) -> str:
    """Every arm, and its difference to the joint hold-out set with the batch of training."""
    middle = f"joint, hold-out batch {SIZES[1]}"
    lines: list[list[object]] = []
    for data in dict.fromkeys(row["data"] for row in rows):
        found: dict[str, dict[int, float]] = {}
        for row in runs.of(rows, data=data):
            found.setdefault(holdout_arm(row), {})[row["seed"]] = row["error"]
        for name, errors in found.items():
            difference = None if name == middle else runs.paired(errors, found.get(middle, {}))
            shown = _told(difference, "better", "worse")
            lines.append([data, name, len(errors), runs.mean_text(list(errors.values())), shown, SAYS.get(name, "")])
    columns = ["data", "FixMatch + L2I", "seeds", "test error, %", f"against {middle}, points", "the paper's"]
    return (
        markdown(columns, lines)
        + "\n\nFive labels a class in all. Differences on the same seeds, with 95% intervals. Separate: the hold-out "
        "images are as they are, all in every step; joint: other views of labeled images.\n\n"
        + markdown(
            ["the paper (CIFAR-100, FixMatch + L2I)", "test error, %"],
            [
                [f"500 labels, hold-out batch {PAPER_SIZES.split(':')[0]}", PAPER_SIZES.split(": ")[1]],
                ["joint, 500 / 1000 / 2000 labels", "44.97 ± 0.13 / 39.21 ± 0.10 / 35.45 ± 0.10"],
                ["separate", "45.27 ± 0.03 / 39.20 ± 0.06 / 35.49 ± 0.15"],
            ],
        )
    )


def _told(difference: Interval | None, below: str, above: str) -> str:
    if difference is None:
        return ""
    words = {"helps": below, "harms": above}
    verdict = runs.verdict(difference)
    return f"{runs.interval_text(difference)}: {words.get(verdict, verdict)}"


def draw_exact(rows: Sequence[Row]) -> dict[str, Any]:
    """Arms in groups, a point for each seed."""
    groups = [
        (place, base) for place in PLACES for base in BASES if runs.of(rows, data=place[0], labels=place[1], base=base)
    ]
    arms = {
        f"{data}\n{labels} a class\n{base}": {
            arm: list(errors.values())
            for method, arm in (
                ("none", "the base alone"),
                (EXACT, "+ L2I, exact"),
                (APPROXIMATE, "+ L2I, approximate"),
            )
            for name, errors in runs.by_seed(runs.of(rows, data=data, labels=labels, base=base, method=method)).items()
        }
        for (data, labels), base in groups
    }
    return {"figure": _grouped(arms)}


def draw_holdout(rows: Sequence[Row]) -> dict[str, Any]:
    """Arms in groups, a point for each seed."""
    arms: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        arms.setdefault(row["data"], {}).setdefault(holdout_arm(row), []).append(row["error"])
    return {"figure": _grouped(arms)}


def _grouped(groups: dict[str, dict[str, list[float]]]) -> Any:
    figure, axes = pyplot().subplots(figsize=(7.4, 3.4), layout="constrained")
    style(axes)
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    colors = ("0.6", "#D55E00", "#0072B2", "#56B4E9", "#009E73")
    for place, group in enumerate(groups.values()):
        for name, values in group.items():
            x = place + (names.index(name) + 0.5) / len(names) * 0.8 - 0.4
            color = colors[names.index(name) % len(colors)]
            axes.bar(x, sum(values) / len(values), 0.7 / len(names), color=color, label=name if place == 0 else None)
            axes.plot([x] * len(values), values, ".", color="0.1", markersize=3)
    axes.set_xticks(range(len(groups)), list(groups), fontsize="small")
    axes.set_ylabel("test error, %")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize="small")
    return figure


L2I_EXACT = Experiment(
    name="l2i-exact-vs-approx",
    paper="Learning to Impute, Tables 7 and 8: the exact update rule and Eq. (6)",
    cells=exact_cells,
    measure=runs.measure,
    table=exact_table,
    draw=draw_exact,
    parallel=True,
)
L2I_HOLDOUT = Experiment(
    name="l2i-holdout",
    paper="Learning to Impute, Tables 5 and 6: size of the hold-out batch, joint and separate hold-out set",
    cells=holdout_cells,
    measure=measure_holdout,
    table=holdout_table,
    draw=draw_holdout,
    parallel=True,
)
