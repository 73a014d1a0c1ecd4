"""Which base, which method, with how many labels: runs of the trainer on three sets of real images.

Digits (8 pixels), 5,000 digits of MNIST (14) and patches of photographs (16), with the settings that were chosen on the
digits' validation images: see :mod:`fastmeta.reproduce.runs`. Cells come in rounds of seeds, and in a round by
what they tell: the largest effect first, whether it is the base's settings, where it ends, other bases, everything.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from fastmeta.reproduce import runs
from fastmeta.reproduce.experiment import Experiment, Row, markdown
from fastmeta.reproduce.which_method import PLAIN, order_of, page
from fastmeta.ssl import BASES
from fastmeta.training.recipes import DEFAULT_METHODS
from fastmeta.training.reports.drawing import pyplot, style
from fastmeta.training.reports.intervals import t_interval

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
    """Test error of FixMatch against the number of labels, alone and with methods."""
    names = list(dict.fromkeys(row["data"] for row in rows)) or ["digits"]
    figure, grid = pyplot().subplots(
        1, len(names), figsize=(max(5.0, 3.7 * len(names)), 3.4), squeeze=False, layout="constrained"
    )
    for axes, data in zip(grid[0], names, strict=True):
        style(axes)
        for place, method in enumerate(MAIN):
            arm = "fixmatch" if method == PLAIN else f"fixmatch + {method}"
            points = []
            for _, labels in order_of(runs.of(rows, data=data)):
                errors = runs.by_seed(runs.of(rows, data=data, labels=labels)).get(arm)
                if errors:
                    points.append((labels * 1.04**place, t_interval(list(errors.values()))))
            if not points:
                continue
            x, means = [x for x, _ in points], [interval.mean for _, interval in points]
            axes.plot(x, means, "o-", color=COLORS[method], markersize=4, label=arm if data == names[0] else None)
            for at, interval in points:
                if interval.low is not None and interval.high is not None:
                    axes.plot([at, at], [max(0, interval.low), interval.high], color=COLORS[method], linewidth=1)
        axes.set_xscale("log")
        axes.set_xticks(EDGE, [str(labels) for labels in EDGE])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set(title=data, xlabel="labels a class")
    grid[0][0].set_ylabel("test error, %")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize="small")
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
