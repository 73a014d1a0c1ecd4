"""Meta-Gradient's ablation (slides, "Ablation Studies"): its loop without the meta-gradient, without mix-up, with both.

The slides have CIFAR-10 with 4,000 labels, SVHN with 1,000 and CIFAR-100 with 10,000. Here the same four rows in the
published loop (Algorithm 2: a pass in evaluation mode for the labels, probes of radius 0.01, a label step equal to the
learning rate, mix-up with Beta(1, 1)) with a small net on images that come with Python packages.
"""

from collections.abc import Sequence
from typing import Any

from fastmeta.reproduce import runs
from fastmeta.reproduce.experiment import Experiment, Row, markdown
from fastmeta.training.reports.drawing import pyplot, style

PAPER = {  # error in percent on SVHN, CIFAR-10 and CIFAR-100 by (meta, mix-up)
    (False, False): (9.76, 15.43, 38.74),
    (True, False): (3.68, 11.63, 35.40),
    (False, True): (5.60, 11.10, 32.67),
    (True, True): (3.15, 7.78, 30.74),
}
PLACES = (("digits", 4), ("digits", 25), ("mnist-5k", 10))
RATE = 0.1  # published
NEITHER = "neither"


def cells(quick: bool) -> list[Row]:
    """The four rows on a seed before the next seed."""
    places, seeds = (PLACES[:1], range(2)) if quick else (PLACES, range(8))
    return [
        runs.cell(
            data,
            labels,
            "mix-up-consistency",
            "meta-gradient-published" if meta else "none",
            seed,
            runs.QUICK_STEPS if quick else runs.STEPS,
            base_settings={"mix_up": mix_up},
            optimizer={"learning_rate": RATE, "nesterov": False},
            labeled_view="weak",
        )
        for seed in seeds
        for data, labels in places
        for meta, mix_up in PAPER
    ]


def name_of(meta: bool, mix_up: bool) -> str:
    """Of a row."""
    return {(False, False): NEITHER, (True, True): "both"}.get((meta, mix_up), "meta" if meta else "mix-up")


def errors_of(rows: Sequence[Row], data: str, labels: int) -> dict[str, dict[int, float]]:
    """By row of the ablation and seed."""
    found: dict[str, dict[int, float]] = {name_of(*key): {} for key in PAPER}
    for row in runs.of(rows, data=data, labels=labels):
        name = name_of(row["method"] != "none", row["changes"]["base_settings"]["mix_up"])
        found[name][row["seed"]] = row["error"]
    return {name: errors for name, errors in found.items() if errors}


def table(rows: Sequence[Row]) -> str:
    """Beside the slides', and whether each part helps here."""
    columns = ["test error, %", *(f"{data}, {labels} a class" for data, labels in PLACES)]
    columns += ["SVHN, slides", "CIFAR-10, slides", "CIFAR-100, slides"]
    found = {place: errors_of(rows, *place) for place in PLACES}
    lines: list[list[object]] = []
    for key, paper in PAPER.items():
        name = name_of(*key)
        here = [
            f"{runs.mean_text(list(found[place][name].values()))} ({len(found[place][name])} seeds)"
            if name in found[place]
            else ""
            for place in PLACES
        ]
        lines.append([name, *here, *(f"{value:.2f}" for value in paper)])
    told: list[list[object]] = []
    for claim, one, other in (
        ("the meta-gradient helps alone", "meta", NEITHER),
        ("mix-up helps alone", "mix-up", NEITHER),
        ("the meta-gradient helps beside mix-up", "both", "mix-up"),
        ("mix-up helps beside the meta-gradient", "both", "meta"),
    ):
        differences = [runs.paired(found[place].get(one, {}), found[place].get(other, {})) for place in PLACES]
        told.append([claim, *("" if d is None else f"{runs.interval_text(d)}: {runs.verdict(d)}" for d in differences)])
    return (
        f"{markdown(columns, lines)}\n\nMean and standard deviation; differences on the same seeds, with 95% "
        "intervals, in points of error:\n\n"
        + markdown(["the slides say", *(f"{data}, {labels} a class" for data, labels in PLACES)], told)
    )


def draw(rows: Sequence[Row]) -> dict[str, Any]:
    """A bar for each row, and a point for each seed."""
    places = [(data, labels) for data, labels in PLACES if runs.of(rows, data=data, labels=labels)] or PLACES[:1]
    size = (3.4 * len(places), 3)
    figure, grid = pyplot().subplots(1, len(places), figsize=size, squeeze=False, layout="constrained")
    for axes, (data, labels) in zip(grid[0], places, strict=True):
        style(axes)
        for place, (name, errors) in enumerate(errors_of(rows, data, labels).items()):
            values = list(errors.values())
            axes.bar(place, sum(values) / len(values), color="0.75" if name in (NEITHER, "mix-up") else "#56B4E9")
            axes.plot([place] * len(values), values, ".", color="0.2", markersize=4)
        axes.set_xticks(range(len(PAPER)), [name_of(*key) for key in PAPER])
        axes.set_title(f"{data}, {labels} labels a class", fontsize="medium")
    grid[0][0].set_ylabel("test error, %")
    return {"figure": figure}


META_ABLATION = Experiment(
    name="meta-ablation",
    paper='Meta-Gradient, slides, "Ablation Studies": the meta-gradient and mix-up, each alone and both',
    cells=cells,
    measure=runs.measure,
    table=table,
    draw=draw,
    parallel=True,
)
