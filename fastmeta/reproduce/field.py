"""Which base, which method, with how many labels: runs of the trainer on three sets of real images.

Digits (8 pixels), 5,000 digits of MNIST (14) and patches of photographs (16), with the settings that were chosen on the
digits' validation images: see :mod:`fastmeta.reproduce.runs`. Cells come in rounds of seeds, and in a round by
what they tell: the largest effect first, whether it is the base's settings, where it ends, other bases, everything.
"""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from fastmeta.reproduce import runs
from fastmeta.reproduce.experiment import Experiment, Row, markdown
from fastmeta.reproduce.which_method import BASE, FEWEST, PLAIN, order_of, page
from fastmeta.ssl import BASES
from fastmeta.training.recipes import DEFAULT_METHODS
from fastmeta.training.reports.drawing import pyplot, style

ROUNDS = (range(3), range(3, 6), range(6, 10))
MAIN = ("none", "l2i", "implicit-imputation", "meta-gradient")
ALIGNED: dict[str, Any] = {"base_settings": {"distribution_alignment": "uniform"}}
TUNED: tuple[dict[str, Any], ...] = (
    {"base_settings": {"threshold": 0.95}},
    {"base_settings": {"threshold": 0.6}},
    {"optimizer": {"learning_rate": 0.05}},
    ALIGNED,
)
"""Other settings of FixMatch; with twice the steps a fifth."""
EDGE = (1, 2, 4, 10, 25)
OTHERS = ("pseudo-label", "mean-teacher", "vat", "uda", "mixmatch", "remixmatch", "flexmatch", "freematch")


def cells(quick: bool) -> list[Row]:
    """Every cell once, the most informative first."""
    if quick:
        return [
            runs.cell("digits", labels, "fixmatch", method, seed, runs.QUICK_STEPS)
            for seed in range(2)
            for labels in (1, 4)
            for method in ("none", "l2i")
        ]
    found: list[Row] = []
    for seeds in ROUNDS:
        for question in (_largest, _tuned, _edges, _methods, _bases, _photographs):
            found += (cell for seed in seeds for cell in question(seed))
    for seeds in ROUNDS:
        found += (cell for seed in seeds for cell in _everything(seed))
    unique: list[Row] = []
    for cell in found:
        if cell not in unique:
            unique.append(cell)
    return unique


def _largest(seed: int) -> Iterator[Row]:
    for method in MAIN:
        yield runs.cell("mnist-5k", 1, "fixmatch", method, seed)


def _tuned(seed: int) -> Iterator[Row]:
    for changes in TUNED:
        yield runs.cell("mnist-5k", 1, "fixmatch", "none", seed, **changes)
    yield runs.cell("mnist-5k", 1, "fixmatch", "none", seed, 2 * runs.STEPS)
    for method in MAIN[1:]:
        yield runs.cell("mnist-5k", 1, "fixmatch", method, seed, **ALIGNED)


def _edges(seed: int) -> Iterator[Row]:
    for labels in EDGE:
        for method in ("none", "l2i"):
            yield runs.cell("digits", labels, "fixmatch", method, seed)
            yield runs.cell("mnist-5k", labels, "fixmatch", method, seed)


def _methods(seed: int) -> Iterator[Row]:
    for labels in (1, 4):
        for method in DEFAULT_METHODS:
            yield runs.cell("digits", labels, "fixmatch", method, seed)


def _bases(seed: int) -> Iterator[Row]:
    for base in OTHERS:
        for method in ("none", "l2i"):
            yield runs.cell("digits", 1, base, method, seed)


def _photographs(seed: int) -> Iterator[Row]:
    for labels in (1, 4, 25):
        for method in MAIN if labels == 1 else MAIN[:2]:
            yield runs.cell("photographs", labels, "fixmatch", method, seed)


def _everything(seed: int) -> Iterator[Row]:
    for labels in (1, 4, 25):
        for base in ("fixmatch", *OTHERS, "supervised", "pi-model", "mix-up"):
            for method in DEFAULT_METHODS if BASES[base].imputes else ("none",):
                yield runs.cell("digits", labels, base, method, seed)


def table(rows: Sequence[Row]) -> str:
    """A table for each data set and number of labels: every base, and its methods against it."""
    parts = []
    for data, labels in order_of(rows):
        here = runs.of(rows, data=data, labels=labels)
        lines: list[list[object]] = []
        for base in dict.fromkeys(row["base"] for row in here):
            lines += runs.comparison(runs.of(here, base=base), base)
        parts.append(f"## {data}, {labels} label{'s' * (labels > 1)} a class\n\n{markdown(runs.COLUMNS, lines)}")
    return (
        "Mean and standard deviation over the seeds; the difference to the base as it is, on the same seeds, with its "
        "95% interval. `example-weights` has three hold-out labels a class that no other sees. No interval is "
        "corrected for how many there are: of twenty without an effect one shows one. "
        "No paper has this table; the papers' own figures are on other images.\n\n" + "\n\n".join(parts)
    )


COLORS = dict(zip(MAIN, ("0.45", "#D55E00", "#009E73", "#0072B2"), strict=True))


def draw(rows: Sequence[Row]) -> dict[str, Any]:
    """Test error of FixMatch against the number of labels, alone and with methods, and what each method changes."""
    names = list(dict.fromkeys(row["data"] for row in rows)) or ["digits"]
    figure, grid = pyplot().subplots(
        2, len(names), figsize=(max(5.0, 3.7 * len(names)), 5.2), squeeze=False, sharex=True, layout="constrained"
    )
    for column, data in enumerate(names):
        for axes in grid[:, column]:
            style(axes)
        above, below = grid[:, column]
        below.axhline(0, color=COLORS[PLAIN], linewidth=1)
        for place, method in enumerate(MAIN):
            arm = BASE if method == PLAIN else f"{BASE} + {method}"
            means, changes = [], []
            for _, labels in order_of(runs.of(rows, data=data)):
                errors = runs.by_seed(runs.of(rows, data=data, labels=labels))
                if len(errors.get(arm, {})) < FEWEST:
                    continue
                means.append((labels, statistics.fmean(errors[arm].values())))
                difference = runs.paired(errors[arm], errors.get(BASE, {}))
                if difference is not None and difference.low is not None:
                    changes.append((labels * 1.05 ** (place - 2), difference))
            if not means:
                continue
            above.plot(*zip(*means, strict=True), "o-", color=COLORS[method], markersize=4, label=arm)
            if method != PLAIN and changes:
                x = [x for x, _ in changes]
                below.vlines(x, [one.low for _, one in changes], [one.high for _, one in changes], COLORS[method])
                below.plot(x, [one.mean for _, one in changes], "o", color=COLORS[method], markersize=4)
        above.set_ylim(bottom=0)
        above.set_title(data)
        below.set_xscale("log")
        below.set_xticks(EDGE, [str(labels) for labels in EDGE])
        below.minorticks_off()
        below.set_xlabel("labels a class")
    grid[0][0].set_ylabel("test error, %")
    grid[1][0].set_ylabel(f"minus {BASE},\npoints, 95%")
    handles, labels_of = grid[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels_of, loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    return {"figure": figure}


FIELD = Experiment(
    name="field",
    paper="Bases and methods of all the papers on small real images, by number of labels",
    cells=cells,
    measure=runs.measure,
    table=table,
    draw=draw,
    pages=lambda rows: {"which-method.md": page(rows)},
    parallel=True,
)
