"""Weights for unlabeled points of the plane (Not All Unlabeled Data Are Equal, Section 4.1, Figs. 1 and 2).

The paper's: 10 labeled, 30 validation and 1,000 unlabeled points; two fully-connected layers with 100 hidden units and
a ReLU; Algorithm 1 with Adam on pseudo-labels. Chosen here, as the paper prints none of it: the points (linear: uniform
in a square, 0.1 and more from the line ``x + y = 0``; circles and moons: scikit-learn's, noise 0.1, factor 0.5); N = 10
inner steps of 128 unlabeled points at rate 0.01; 100 outer steps on all 1,000 at rate 0.5; the last layer's exact
Hessian, of means, with damping 0.01. The last four are the best of six settings tried on four draws of other points.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from fastmeta.reproduce.experiment import Experiment, Row, markdown
from fastmeta.reproduce.points_in_the_plane import ARMS, GRID, LIGHTEST, SINGLE, WEIGHTS, Run, Task, truth
from fastmeta.training.reports.drawing import pyplot
from fastmeta.training.reports.intervals import t_interval

OTHERS = {"supervised": "#009E73", "pseudo-label": "#D55E00"}  # with a boundary in the picture
SHADES = [0.02 * number for number in range(101)]  # of the weights, which are in [0, 2]


def cells(quick: bool) -> list[Row]:
    """A seed each; the first keeps what its picture needs."""
    seeds, outer_steps = (1, 10) if quick else (12, 100)
    return [{"seed": seed, "outer_steps": outer_steps, "picture": seed == 0} for seed in range(seeds)]


def measure(seed: int, outer_steps: int, picture: bool, *, name: str) -> Row:
    """Test error of every arm, and what the weights are like on the way."""
    task = Task(name, seed)
    shown = sorted({1, outer_steps // 5, outer_steps})
    errors, weights, pictures = {}, [], []
    for arm in ARMS:
        run = Run(task, arm, seed)
        for number in range(1, outer_steps + 1):
            run.step()
            if arm == WEIGHTS and number in shown:
                weights.append({"step": number, **run.about_weights()})
            if picture and number in (shown if arm == WEIGHTS else [outer_steps] if arm in OTHERS else []):
                pictures.append(_picture(run, arm, number))
        errors[arm] = run.test_error()
    return {"errors": errors, "weights": weights, "pictures": pictures}


def _picture(run: Run, arm: str, number: int) -> Row:
    across, up = run.task.grid()
    places = torch.cartesian_prod(up, across).flip(1)
    return {
        "arm": arm,
        "step": number,
        "margin": [round(value, 2) for value in run.margin(places).tolist()],
        "weights": [round(value, 2) for value in run.weights.tolist()] if arm == WEIGHTS else None,
    }


def table(rows: Sequence[Row]) -> str:
    """Test errors with paired intervals, and the paper's two sentences held against the weights."""
    lines = []
    for arm in ARMS:
        errors = [row["errors"][arm] for row in rows]
        against = t_interval([row["errors"][arm] - row["errors"]["pseudo-label"] for row in rows])
        lines.append([arm, _mean(errors), "" if arm == "pseudo-label" else _interval(against)])
    about = [
        "outer step",
        "wrong of all, %",
        f"of the {LIGHTEST} lightest, %",
        "AUC",
        "margin of all",
        "of the lightest",
    ]
    told: list[list[object]] = []
    for numbers in zip(*(row["weights"] for row in rows), strict=True):
        known = [found["auc"] for found in numbers if found["auc"] is not None]
        told.append(
            [
                numbers[0]["step"],
                _mean([found["wrong"] for found in numbers]),
                _mean([found["wrong_among_lowest"] for found in numbers]),
                f"{sum(known) / len(known):.2f} ({len(known)} seeds)" if known else "",
                f"{sum(found['margin'] for found in numbers) / len(numbers):.2f}",
                f"{sum(found['margin_of_lowest'] for found in numbers) / len(numbers):.2f}",
            ]
        )
    return (
        f"Test error in percent after {rows[0]['outer_steps']} outer steps, {len(rows)} seeds: mean, and difference to "
        "pseudo-labels of weight 1 on the same seed with its 95% interval. The weights are learned from 30 validation "
        "labels; the last two rows train on those labels instead.\n\n"
        f"{markdown(['', 'test error', 'minus pseudo-label'], lines)}\n\n"
        "Who lost weight: points with a wrong pseudo-label? AUC: probability that one weighs less than one with "
        "a right label (0.5: by chance). Margin: |p - (1 - p)|, 0 on the boundary, 1 for a sure prediction.\n\n"
        f"{markdown(about, told)}\n\n{_findings(rows)}"
    )


def _findings(rows: Sequence[Row]) -> str:
    def difference(arm: str, other: str) -> str:
        interval = t_interval([row["errors"][arm] - row["errors"][other] for row in rows])
        if interval.low is None or interval.high is None or interval.low <= 0 <= interval.high:
            return f"no difference shown ({_interval(interval)} points)"
        return f"{'yes' if interval.high < 0 else 'no'} ({_interval(interval)} points)"

    def lightest(place: int) -> str:
        found = [row["weights"][place] for row in rows]
        near = sum(one["margin_of_lowest"] < one["margin"] for one in found)
        wrong, among = ([one[key] for one in found] for key in ("wrong", "wrong_among_lowest"))
        return (
            f"after outer step {found[0]['step']}: nearer to it than all in {near} of {len(found)} seeds, "
            f"{_mean(among)}% wrong ({_mean(wrong)}% of all)"
        )

    lines = [
        [
            "per-example weights come closer to the truth than supervised training (Fig. 1)",
            difference(WEIGHTS, "supervised"),
        ],
        ["and than the base they weight", difference(WEIGHTS, "pseudo-label")],
        ["per-example weights beat a single weight (Section 4.3 says so of images)", difference(WEIGHTS, SINGLE)],
        [
            "points that are down-weighted most are near the boundary and on its wrong side (Section 4.1)",
            f"{lightest(0)}; {lightest(-1)}",
        ],
        [
            "(not asked:) weighting by the validation labels beats training on them",
            difference(WEIGHTS, "pseudo-label, 40 labels"),
        ],
    ]
    return markdown(["the paper says", "here"], lines)


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.1f}"


def _interval(interval: Any) -> str:
    return f"{interval.mean:+.1f}" + ("" if interval.low is None else f" [{interval.low:+.1f}, {interval.high:+.1f}]")


def draw(rows: Sequence[Row], *, name: str) -> dict[str, Any]:
    """Boundaries on the way; an unlabeled point is black where it has lost its weight, pale where it is heaviest."""
    row = next((row for row in rows if row["pictures"]), None)
    if row is None:
        return {}
    task = Task(name, row["seed"])
    across, up = task.grid()
    places = torch.cartesian_prod(up, across).flip(1)
    ends = {shown["arm"]: shown for shown in row["pictures"]}
    steps = [shown for shown in row["pictures"] if shown["arm"] == WEIGHTS]
    height = 4.1 * float((up[-1] - up[0]) / (across[-1] - across[0])) + 0.7
    figure, grid = pyplot().subplots(
        1, len(steps), figsize=(4.1 * len(steps), height), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )

    def boundary(axes: Any, values: Any, color: str, line: str) -> None:
        levels = torch.as_tensor(values).reshape(GRID, GRID)
        axes.contour(across, up, levels, levels=[0], colors=[color], linestyles=[line], linewidths=1.8)

    for axes, shown in zip(grid[0], steps, strict=True):
        points = axes.scatter(*task.x_u.T, c=shown["weights"], cmap="RdPu_r", vmin=0, vmax=2.6, s=7, linewidths=0)
        axes.scatter(*task.x_l.T, c="#E69F00", s=45, edgecolors="black", linewidths=0.8)
        boundary(axes, truth(name, places), "0.35", "-")
        boundary(axes, shown["margin"], "#0072B2", "-")
        for arm, color in OTHERS.items():
            boundary(axes, ends[arm]["margin"], color, "--")
        axes.set_title(f"outer step {shown['step']}", fontsize="medium")
        axes.set(xticks=[], yticks=[], aspect="equal")
    drawn = {
        "the truth": ("0.35", "-"),
        WEIGHTS: ("#0072B2", "-"),
        **{arm: (color, "--") for arm, color in OTHERS.items()},
    }
    lines = [
        pyplot().Line2D([], [], color=color, linestyle=line, label=label) for label, (color, line) in drawn.items()
    ]
    lines.append(
        pyplot().Line2D([], [], color="#E69F00", marker="o", markeredgecolor="black", linewidth=0, label="labeled")
    )
    error, others = row["errors"][WEIGHTS], [other["errors"][WEIGHTS] for other in rows]
    figure.suptitle(
        f"seed {row['seed']}: test error {error:.1f}% at the end (mean of all seeds {_mean(others)}%)",
        fontsize="medium",
    )
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False, fontsize="small")
    figure.colorbar(points, ax=grid[0][-1], label="weight", shrink=0.7, boundaries=SHADES, ticks=[0, 1, 2])
    return {"figure": figure}


def experiment(name: str, figure: str) -> Experiment:
    """One of the three data sets."""
    return Experiment(
        name=f"weights-{name}",
        paper=f"Not All Unlabeled Data Are Equal, Section 4.1, {figure}: weights of points in the plane, {name}",
        cells=cells,
        measure=partial(measure, name=name),
        table=table,
        draw=partial(draw, name=name),
    )


WEIGHTS_LINEAR = experiment("linear", "Fig. 1")
WEIGHTS_CIRCLES = experiment("circles", "Fig. 2")
WEIGHTS_MOONS = experiment("moons", "Fig. 2")
