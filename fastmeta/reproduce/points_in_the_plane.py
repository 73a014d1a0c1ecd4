"""Points of the plane, and a net that learns them with weights for the unlabeled ones.

See :mod:`fastmeta.reproduce.weights_in_the_plane`.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

import fastmeta
from fastmeta.reproduce.experiment import Row

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
GRID = 41
LIGHTEST = UNLABELED // 20


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
        lowest = self.weights.argsort()[:LIGHTEST]
        both = bool(wrong.any()) and bool((~wrong).any())
        return {
            # Probability that a point with a wrong label weighs less than one with a right label.
            "auc": float(roc_auc_score(wrong.numpy(), -self.weights.numpy())) if both else None,
            "wrong": 100 * float(wrong.float().mean()),
            "wrong_among_lowest": 100 * float(wrong[lowest].float().mean()),
            "margin": float(margin.abs().mean()),
            "margin_of_lowest": float(margin[lowest].abs().mean()),
        }
