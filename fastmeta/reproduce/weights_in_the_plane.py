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
from torch import Tensor, nn
from torch.nn import functional

import fastmeta
from fastmeta.reproduce.experiment import Experiment, Row, markdown
from fastmeta.training.reports.drawing import pyplot
from fastmeta.training.reports.intervals import t_interval

LABELED, VALIDATION, UNLABELED, TEST = 10, 30, 1000, 2000
INNER_STEPS, RATE, BATCH = 10, 0.01, 128
OUTER_RATE, DAMPING = 0.5, 0.01
WEIGHTS, SINGLE = "per-example weights", "a single weight"
# Name: whether there are unlabeled points, and whether the validation labels are labels to train on.
ARMS = {
    "supervised": (False, False),
    "pseudo-label": (True, False),
    SINGLE: (True, False),
    WEIGHTS: (True, False),
    "supervised, 40 labels": (False, True),
    "pseudo-label, 40 labels": (True, True),
}
OTHERS = {"supervised": "#009E73", "pseudo-label": "#D55E00"}  # with a boundary in the picture
GRID = 41
SHADES = [0.02 * number for number in range(101)]  # of the weights, which are in [0, 2]
LOWEST = UNLABELED // 20


def cells(quick: bool) -> list[Row]:
    """A seed each; the first keeps what its picture needs."""
    seeds, outer_steps = (1, 10) if quick else (12, 100)
    return [{"seed": seed, "outer_steps": outer_steps, "picture": seed == 0} for seed in range(seeds)]


def points(name: str, number: int, seed: int) -> tuple[Tensor, Tensor]:
    """``[n, 2]`` and their classes ``[n]``, 0 or 1."""
    from sklearn.datasets import make_circles, make_moons

    if name == "linear":
        drawn = 3 * torch.rand(4 * number, 2, generator=torch.Generator().manual_seed(seed)) - 1.5
        drawn = drawn[drawn.sum(1).abs() > 0.1 * 2**0.5][:number]
        return drawn, (drawn.sum(1) > 0).long()
    make = partial(make_circles, factor=0.5) if name == "circles" else make_moons
    places, classes = make(number, noise=0.1, random_state=seed)
    return torch.tensor(places, dtype=torch.float32), torch.tensor(classes)


def truth(name: str, places: Tensor) -> Tensor:
    """Above 0 where class 1 is nearer without the noise ``[n]``."""
    if name == "linear":
        return places.sum(1)
    if name == "circles":
        return 0.75 - places.norm(dim=1)
    angles = torch.linspace(0, torch.pi, 200)
    moons = torch.stack([angles.cos(), angles.sin()], 1), torch.stack([1 - angles.cos(), 0.5 - angles.sin()], 1)
    outer, inner = (torch.cdist(places, moon).amin(1) for moon in moons)
    return outer - inner


class Task:
    """The points of a seed, in parts."""

    def __init__(self, name: str, seed: int) -> None:
        x, y = points(name, 2 * (LABELED + VALIDATION + UNLABELED + TEST), seed)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        # As many of either class among the labeled, the validation, the unlabeled and the test points.
        zero, one = (order[y[order] == value] for value in (0, 1))
        sizes = [LABELED // 2, VALIDATION // 2, UNLABELED // 2, TEST // 2]
        halves = [part[: sum(sizes)].split(sizes) for part in (zero, one)]
        parts = [torch.cat(pair) for pair in zip(*halves, strict=True)]
        (self.x_l, self.y_l), (self.x_v, self.y_v), (self.x_u, self.y_u), (self.x_t, self.y_t) = (
            (x[part], y[part]) for part in parts
        )

    def grid(self) -> tuple[Tensor, Tensor]:
        """Places along both axes ``[GRID]``, for pictures."""
        low, high = self.x_u.amin(0) - 0.1, self.x_u.amax(0) + 0.1
        return torch.linspace(float(low[0]), float(high[0]), GRID), torch.linspace(float(low[1]), float(high[1]), GRID)


class Run:
    """One arm of a seed, trained by :meth:`step`, an outer step of Algorithm 1 each."""

    def __init__(self, task: Task, arm: str, seed: int) -> None:
        self.task = task
        self.uses_unlabeled, more_labels = ARMS[arm]
        self.x, self.y = task.x_l, task.y_l
        if more_labels:
            self.x, self.y = torch.cat([task.x_l, task.x_v]), torch.cat([task.y_l, task.y_v])
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(2, 100), nn.ReLU(), nn.Linear(100, 2))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=RATE)
        self.generator = torch.Generator().manual_seed(seed)
        self.weights = torch.ones(UNLABELED)
        self.method = None
        if arm in (WEIGHTS, SINGLE):
            self.method = fastmeta.ExampleWeights(
                UNLABELED, lr=OUTER_RATE, damping=DAMPING, inverse_hessian="cholesky", shared=arm == SINGLE
            )

    def step(self) -> None:
        """Lines 3 to 12."""
        for _ in range(INNER_STEPS):
            drawn = torch.randint(UNLABELED, (BATCH,), generator=self.generator)
            x_u = self.task.x_u[drawn[: BATCH * self.uses_unlabeled]]
            logits, logits_u = self.model(torch.cat([self.x, x_u])).split([len(self.x), len(x_u)])
            loss = functional.cross_entropy(logits, self.y)
            if self.uses_unlabeled:
                each = functional.cross_entropy(logits_u, logits_u.argmax(1), reduction="none")
                loss = loss + (self.weights[drawn] * each).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        if self.method is not None:
            task, everything = self.task, torch.cat([self.x, self.task.x_u, self.task.x_v])
            with torch.no_grad(), fastmeta.capture_features(self.model) as tape:
                logits, logits_u, logits_v = self.model(everything).split([len(self.x), UNLABELED, VALIDATION])
            self.weights = self.method.refine(
                unlabeled=tape.outputs(logits_u),
                index=torch.arange(UNLABELED),
                holdout=tape.outputs(logits_v),
                targets=task.y_v,
                labeled=tape.outputs(logits),
                labeled_targets=self.y,
            ).weights

    @torch.no_grad()
    def margin(self, x: Tensor) -> Tensor:
        """Above 0 where the prediction is class 1 ``[n]``, in (-1, 1)."""
        return 2 * self.model(x).softmax(1)[:, 1] - 1

    def test_error(self) -> float:
        """In percent."""
        wrong = (self.margin(self.task.x_t) > 0).long() != self.task.y_t
        return 100 * float(wrong.float().mean())

    def about_weights(self) -> Row:
        """Who lost weight: those with wrong pseudo-labels, or those near the boundary?"""
        from sklearn.metrics import roc_auc_score

        margin = self.margin(self.task.x_u)
        wrong = (margin > 0).long() != self.task.y_u
        lowest = self.weights.argsort()[:LOWEST]
        both = bool(wrong.any()) and bool((~wrong).any())
        return {
            # Probability that a point with a wrong label weighs less than one with a right label.
            "auc": float(roc_auc_score(wrong.numpy(), -self.weights.numpy())) if both else None,
            "wrong": 100 * float(wrong.float().mean()),
            "wrong_among_lowest": 100 * float(wrong[lowest].float().mean()),
            "margin": float(margin.abs().mean()),
            "margin_of_lowest": float(margin[lowest].abs().mean()),
        }


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
    about = ["outer step", "wrong of all, %", f"of the {LOWEST} lightest, %", "AUC", "margin of all", "of the lightest"]
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
