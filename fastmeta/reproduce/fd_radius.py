"""What Meta-Gradient's finite difference of radius 0.01 measures (Eq. (16)), by radius and stage of training.

The published loop (``mix-up-consistency + meta-gradient-published``) is trained, and stopped on the way: there ``v`` is
the gradient of the labeled loss in evaluation mode, and the derivative of the unlabeled images' probabilities along it
is taken in float64 and forward mode, in float32 and forward mode, and by central differences of radius ``r / norm(v)``
in float32. The error is ``norm(difference - derivative) / norm(derivative)``. No paper has this table.
"""

import copy
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import fastmeta
from fastmeta.reproduce import runs
from fastmeta.reproduce.experiment import Experiment, Row, markdown
from fastmeta.training.build import build, load_images
from fastmeta.training.reports.drawing import pyplot, style

PUBLISHED = 0.01
RADII = (1e-5, 1e-4, 1e-3, 3e-3, PUBLISHED, 3e-2, 1e-1)
IMAGES = 128  # of each kind, as published
STAGES = (0, 30, 100, 300, 1000)


def cells(quick: bool) -> list[Row]:
    """A training each, with all its stages."""
    places, seeds, stages = (["digits"], 1, (0, 4)) if quick else (["digits", "mnist-5k"], 5, STAGES)
    return [{"data": data, "labels": 25, "stages": list(stages), "seed": s} for s in range(seeds) for data in places]


def measure(data: str, labels: int, stages: Sequence[int], seed: int) -> Row:
    """Errors at each stage."""
    settings = runs.cell(
        data,
        labels,
        "mix-up-consistency",
        "meta-gradient-published",
        seed,
        max(1, *stages),
        optimizer={"learning_rate": 0.1, "nesterov": False},
        labeled_view="weak",
    )
    config = runs.config_of(**settings)
    with torch.random.fork_rng(devices=[]):
        run = build(config, load_images(config))
        split, targets = run.split, run.images.targets
        generator = torch.Generator().manual_seed(seed)
        labeled, unlabeled = (
            part[torch.randperm(len(part), generator=generator)[:IMAGES]] for part in (split.labeled, split.unlabeled)
        )
        x_l, x_u = (run.trainer.batches.data.views.plain(run.images.get(part)) for part in (labeled, unlabeled))
        found = []
        try:
            for stage in stages:
                while run.trainer.step < stage:
                    run.trainer.train_step()
                found.append({"stage": stage, **errors_at(run.trainer.model, x_l, targets[labeled], x_u)})
        finally:
            run.trainer.batches.close()
    return {"found": found}


def errors_at(model: nn.Module, x_l: Tensor, y_l: Tensor, x_u: Tensor) -> Row:
    """Of every way at one model, in evaluation mode; the model's own mode is restored."""
    model = copy.deepcopy(model).eval()
    parameters = dict(model.named_parameters())
    loss = functional.cross_entropy(model(x_l), y_l)
    v = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    exact_model = copy.deepcopy(model).double()
    exact = _derivative(exact_model, x_u.double(), {name: value.double() for name, value in v.items()}, how="jvp")

    def error(derivative: Tensor) -> float:
        return float((derivative.double() - exact).norm() / exact.norm())

    def difference(radius: float) -> Tensor:
        return _derivative(model, x_u, v, how="finite_difference", radius=radius)

    probe = difference(PUBLISHED).double()
    return {
        "loss": float(loss.detach()),
        "norm": float(torch.cat([value.flatten() for value in v.values()]).norm()),
        "forward_mode": error(_derivative(model, x_u, v, how="jvp")),
        "differences": [error(difference(radius)) for radius in RADII],
        "cosine": float(functional.cosine_similarity(probe.flatten(), exact.flatten(), dim=0)),
    }


def _derivative(model: nn.Module, x: Tensor, v: dict[str, Tensor], **how: Any) -> Tensor:
    """``D_v p [N, C]``."""
    return fastmeta.label_gradient(model, x, v, loss="mse_probs", scale=0.5, **how)


def by_stage(rows: Sequence[Row], data: str) -> dict[int, list[Row]]:
    """What every seed found at a stage."""
    found: dict[int, list[Row]] = {}
    for row in runs.of(rows, data=data):
        for at in row["found"]:
            found.setdefault(at["stage"], []).append(at)
    return dict(sorted(found.items()))


def table(rows: Sequence[Row]) -> str:
    """Medians over the seeds."""
    lines: list[list[object]] = []
    far, near = [], []
    for data in dict.fromkeys(row["data"] for row in rows):
        for stage, found in by_stage(rows, data).items():
            errors = [statistics.median(column) for column in zip(*(at["differences"] for at in found), strict=True)]
            loss, norm, mode, cosine = (
                statistics.median(at[key] for at in found) for key in ("loss", "norm", "forward_mode", "cosine")
            )
            shown = [_percent(error) for error in errors]
            place = RADII.index(PUBLISHED)
            shown[place] = f"**{shown[place]}**"
            far.append((errors[place], f"{data}, step {stage}"))
            near.append(RADII[errors.index(min(errors))])
            lines.append(
                [data, stage, len(found), f"{loss:.3g}", f"{norm:.2g}", *shown, f"{cosine:.3f}", _percent(mode)]
            )
    if not lines:
        return "Nothing is measured yet."
    columns = ["data", "step", "seeds", "loss", "norm(v)", *(f"r = {r:g}" for r in RADII)]
    columns += [f"cosine at {PUBLISHED:g}", "forward mode, float32"]
    (least, least_at), (most, most_at) = min(far), max(far)
    radii = " to ".join(f"{radius:g}" for radius in dict.fromkeys((min(near), max(near))))
    return (
        "Relative error against forward mode in float64, medians over the seeds; conv-net, 25 labels a class, "
        f"{IMAGES} unlabeled images:\n\n{markdown(columns, lines)}\n\nAt the published radius of {PUBLISHED:g} the "
        f"error is between {_percent(least)} ({least_at}) and {_percent(most)} ({most_at}). The least error is at a "
        f"radius of {radii}: longer ones leave the linear range, shorter ones are rounded away."
    )


def _percent(error: float) -> str:
    return f"{100 * error:.2g}%" if error < 0.995 else f"{100 * error:.0f}%"


def draw(rows: Sequence[Row]) -> dict[str, Any]:
    """Error against radius, a line for each stage."""
    names = list(dict.fromkeys(row["data"] for row in rows))
    figure, grid = pyplot().subplots(
        1, max(1, len(names)), figsize=(4.4 * max(1, len(names)), 3.2), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, data in zip(grid[0], names, strict=False):
        style(axes)
        stages = by_stage(rows, data)
        for place, (stage, found) in enumerate(stages.items()):
            errors = [statistics.median(column) for column in zip(*(at["differences"] for at in found), strict=True)]
            color = pyplot().get_cmap("viridis")(0.9 * place / max(1, len(stages) - 1))
            axes.loglog(RADII, errors, "o-", color=color, markersize=3, label=f"step {stage}")
        axes.axvline(PUBLISHED, color="0.5", linestyle=":", linewidth=1)
        axes.set(title=data, xlabel="radius (dotted: published)")
        axes.legend(frameon=False, fontsize="small")
    grid[0][0].set_ylabel("relative error")
    return {"figure": figure}


FD_RADIUS = Experiment(
    name="fd-radius",
    paper="Meta-Gradient, Eq. (16): the error of its finite difference by radius and stage of training",
    cells=cells,
    measure=measure,
    table=table,
    draw=draw,
    parallel=True,
)
