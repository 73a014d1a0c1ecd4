"""Methods with a table in the trainer against loops written out here from the papers, whole steps in float64."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from loops_by_hand import assert_same_parameters, rate, run_of, stepped
from small_trainers import CLASSES, SIZES
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastmeta.methods import example_weights, l2i
from fastmeta.ssl import TrainingBatch
from fastmeta.training.config import OptimizerConfig, RunConfig
from fastmeta.training.recipes import METHODS

BASES = {"pseudo-label": {"soft": True, "ramp": 0.0}, "vat": {"weight": 0.0, "entropy_weight": 0.0}}


@pytest.mark.parametrize(
    ("base", "how", "optimizer"),
    [
        ("pseudo-label", "jvp", "adam"),
        ("pseudo-label", "jvp", "masked_adam"),
        ("pseudo-label", "last_layer", "adam"),
        ("vat", "jvp", "adam"),  # without its own losses it is the same
    ],
)
def test_label_gradient_alignment(base: str, how: str, optimizer: str) -> None:
    """Algorithm 1, Eq. (2): labels softmax(w), T(i) times the labeled loss, Adam on all of w or on what is drawn."""
    run, model, batches = run_of(
        base,
        "label-gradient-alignment-published" if how == "jvp" else "label-gradient-alignment",
        steps=3,
        base_settings=BASES[base],
        method_settings={"lr": 0.2, "optimizer": optimizer, "ramp_steps": 7, "epsilon": 1e-6, "dtype": torch.float64},
        optimizer=OptimizerConfig(learning_rate=0.1, momentum=0.0, weight_decay=0.0),
    )
    decay = 0.99 if how == "jvp" else 0.9
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    rows = [torch.zeros(CLASSES, dtype=torch.float64, requires_grad=True) for _ in range(SIZES["unlabeled"])]
    adams = [torch.optim.Adam([row], lr=0.2) for row in rows]
    moving = list(model.parameters()) if how == "jvp" else list(model.fc.parameters())
    mean: list[Tensor] = []
    fourth: list[Tensor] = []
    for step in range(3):
        batch = batches(step)
        labels = torch.stack(rows)[batch.index].softmax(1)
        of_labeled, of_unlabeled = (
            cross_entropy(model(batch.labeled), batch.targets),
            cross_entropy(model(batch.weak), labels),
        )
        g_l = torch.autograd.grad(of_labeled, moving, retain_graph=True)
        g_u = torch.autograd.grad(of_unlabeled, moving, create_graph=True)
        mean = [decay * m + (1 - decay) * g for m, g in zip(mean or g_l, g_l, strict=True)]
        gaps = [m - g for m, g in zip(mean, g_u, strict=True)]
        powers = [gap.detach() ** 4 for gap in gaps]
        fourth = [decay * f + (1 - decay) * p for f, p in zip(fourth or powers, powers, strict=True)]
        objective = sum((gap.square() / (1e-6 + f.sqrt())).sum() for gap, f in zip(gaps, fourth, strict=True))
        for row, gradient in zip(rows, torch.autograd.grad(objective, rows, retain_graph=True), strict=True):
            row.grad = gradient
        drawn = set(batch.index.tolist())
        for place, adam in enumerate(adams):
            if optimizer == "adam" or place in drawn:
                adam.step()
        weight = math.exp(5 * (1 - min(1.0, step / 7)) ** 2)
        stepped(sgd, model, of_unlabeled + weight * of_labeled, rate(step, 0.1))
    assert_same_parameters(run.model, model)
    assert run.method is not None
    torch.testing.assert_close(run.method.method.label_logits, torch.stack(rows).detach(), rtol=1e-6, atol=1e-8)


WEIGHTS: dict[str, dict[str, Any]] = {
    "Algorithm 1": {**dataclasses.asdict(example_weights.preset("paper")), "fresh": True, "holdout": "part"},
    "the code": {},
    "Fig. 4, Adam": {"optimizer": "adam", "lr": 0.1},
    "Fig. 4, SGD": {"optimizer": "sgd", "lr": 0.02},
    "Fig. 4, one weight": {"shared": True},
}
STEPS, INTERVAL, DAMPING = 5, 2, 0.3


class Weights:
    """Eq. (6) with everything by autograd, and an optimizer of torch for each weight."""

    def __init__(self, model: Any, settings: dict[str, Any]) -> None:
        self.model = model
        self.chosen = {**dataclasses.asdict(example_weights.preset("official_code")), **settings}
        self.shared = "shared" in settings
        count = 1 if self.shared else SIZES["unlabeled"]
        self.values = [torch.ones((), dtype=torch.float64, requires_grad=True) for _ in range(count)]
        kind = torch.optim.SGD if settings.get("optimizer") == "sgd" else torch.optim.Adam
        self.optimizers = [kind([value], lr=self.chosen["lr"]) for value in self.values]

    def places(self, batch: TrainingBatch) -> list[int]:
        return [0 if self.shared else place for place in batch.index.tolist()]

    def of(self, batch: TrainingBatch) -> Tensor:
        return torch.stack([self.values[place].detach() for place in self.places(batch)])

    def learn(self, batch: TrainingBatch) -> None:
        """``lambda <- lambda - eta dL/dlambda`` by the last layer."""
        influence = self.influence(batch)
        for value in self.values:
            value.grad = torch.zeros_like(value)
        for place, gradient in zip(self.places(batch), influence, strict=True):
            self.values[place].grad = gradient + (
                self.values[place].grad if self.shared or self.chosen["duplicates"] == "sum" else 0
            )
        for place, optimizer in enumerate(self.optimizers):
            if place in self.places(batch) or self.chosen.get("optimizer") == "adam":
                optimizer.step()
                with torch.no_grad():
                    self.values[place].clamp_(0.0, 2.0)

    def influence(self, batch: TrainingBatch) -> Tensor:
        mask, classes = pseudo_labels(self.model, batch)
        start = torch.cat([self.model.fc.weight, self.model.fc.bias[:, None]], 1).detach()
        reduce = torch.mean if self.chosen["reduction"] == "mean" else torch.sum

        def losses(layer: Tensor, images: Tensor | None, targets: Tensor | None) -> Tensor:
            features = 4 * self.model.body(images).detach()
            return cross_entropy(features @ layer[:, :-1].T + layer[:, -1], targets, reduction="none")

        def total(layer: Tensor) -> Tensor:
            labeled = losses(layer, batch.labeled, batch.targets)
            return reduce(labeled) + reduce(mask * self.of(batch) * losses(layer, batch.second, classes))

        moves = torch.ones_like(start, dtype=torch.bool)
        moves[:, -1] = self.chosen["bias"]  # the code: the kernel alone
        moves = moves.flatten()
        hessian = torch.autograd.functional.hessian(total, start).flatten(2).flatten(0, 1)[moves][:, moves]
        g_v, g_u = (
            torch.autograd.functional.jacobian(function, start).flatten(-2)[..., moves]
            for function in (
                lambda layer: reduce(losses(layer, batch.holdout, batch.holdout_targets)),
                lambda layer: losses(layer, batch.second, classes),
            )
        )
        found = -g_u @ torch.linalg.solve(hessian + DAMPING * torch.eye(len(g_v)).double(), g_v)
        return mask * found if self.chosen["masked"] else found


def pseudo_labels(model: nn.Module, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
    confidence, classes = model(batch.weak).softmax(1).max(1)
    return (confidence >= 0.5).double(), classes


@pytest.mark.parametrize("name", WEIGHTS)
def test_example_weights(name: str) -> None:
    """FixMatch on weighted examples; every N steps the weights learn, in Algorithm 1 on batches of their own."""
    settings = {**WEIGHTS[name], "interval": INTERVAL, "damping": DAMPING, "dtype": torch.float64}
    settings["inverse_hessian"] = "cholesky"
    run, model, batches = run_of(
        "fixmatch",
        "example-weights-published",
        steps=STEPS,
        method_settings=settings,
        optimizer=OptimizerConfig(learning_rate=0.1, momentum=0.0, weight_decay=0.0),
        holdout_batch=4,
    )
    sgd, weights = torch.optim.SGD(model.parameters(), lr=0.1), Weights(model, settings)
    fresh = "fresh" in settings
    for step in range(STEPS):
        batch, due = batches(step), (step + 1) % INTERVAL == 0
        used = weights.of(batch)
        if due and not fresh:
            weights.learn(batch)
            used = weights.of(batch) if weights.chosen["read"] == "after" else used
        mask, classes = pseudo_labels(model, batch)
        assert batch.second is not None
        unlabeled = (mask * used * cross_entropy(model(batch.second), classes, reduction="none")).mean()
        loss = cross_entropy(model(batch.labeled), batch.targets) + unlabeled
        stepped(sgd, model, loss, rate(step, 0.1))
        if due and fresh:
            weights.learn(run.batches.fresh(step // INTERVAL))
    assert run.method is not None
    found = run.method.method.weights
    assert not found.eq(1).all()
    torch.testing.assert_close(found, torch.stack(weights.values).detach(), rtol=1e-7, atol=1e-9)
    assert_same_parameters(run.model, model)


def test_the_page_of_the_papers_loops() -> None:
    """Every row of its tables makes a run."""
    page = (Path(__file__).parents[2] / "docs" / "published-loops.md").read_text()
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], {})
    names = {"dataclasses": dataclasses, "example_weights": example_weights, "l2i": l2i}
    made = 0
    for section in page.split("\n## ")[1:-1]:
        (method,) = re.findall(r"`([\w-]+-published)`", section.splitlines()[0])
        bases = re.findall(r"on `(mix-up-consistency)`", section.splitlines()[0])
        for row in re.findall(r"^\|.*\|$", section, re.MULTILINE)[2:]:
            columns = row.strip("| ").split(" | ")[1:]
            base_settings = eval(columns[0].strip("`")) if bases else {}
            for settings in re.findall(r"`([^`]+)`", columns[-1]):
                chosen = eval(settings, names)
                RunConfig(base=bases[0] if bases else "fixmatch", base_settings=base_settings, method=method)
                assert METHODS[method].build(9, 3, chosen) is not None
                made += 1
    assert made > 25
