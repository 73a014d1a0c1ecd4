"""Mix-up of guesses, MixMatch and ReMixMatch against their definitions.

Image k is one at pixel k and nothing else, so what the model was given says who was mixed with whom, and how much. All
that is mixed is one batch here.
"""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmeta import Refined
from fastmeta.ssl import MixMatch, MixUp, Refiner, ReMixMatch, TrainingBatch

CLASSES, SIDE, LABELED, UNLABELED = 3, 5, 3, 4


class Net(nn.Module):
    """Remembers what it was given, and makes features that differ."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 4), nn.Tanh())
        self.fc = nn.Linear(4, CLASSES)
        self.given: list[Tensor] = []
        self.double()

    def forward(self, images: Tensor) -> Tensor:
        self.given.append(images.detach().clone())
        return self.fc(3 * self.body(images))


def batch_of(views: int) -> TrainingBatch:
    """Pixels in the order: labeled, then view after view."""
    count = LABELED + views * UNLABELED
    images = torch.eye(SIDE * SIDE, dtype=torch.float64)[:count].view(count, 1, SIDE, SIDE)
    labeled, *unlabeled = images.split([LABELED] + [UNLABELED] * views)
    return TrainingBatch(
        labeled=labeled,
        targets=torch.tensor([2, 0, 1]),
        weak=unlabeled[0],
        second=unlabeled[1] if views > 1 else None,
        index=torch.arange(UNLABELED),
        more=tuple(unlabeled[2:]),
    )


def probabilities(model: Net, images: Tensor) -> list[list[float]]:
    with torch.no_grad():
        return model.fc(3 * model.body(images)).softmax(1).tolist()


def mixture(image: Tensor, own: int) -> tuple[int, float]:
    """Partner and share of image ``own``."""
    shares = {place: value for place, value in enumerate(image.flatten().tolist()) if value}
    assert sum(shares.values()) == pytest.approx(1)
    share = shares.pop(own)
    assert len(shares) < 2
    return (next(iter(shares)) if shares else own), share


def mixed(labels: list[list[float]], own: int, partner: int, share: float) -> list[float]:
    return [share * a + (1 - share) * b for a, b in zip(labels[own], labels[partner], strict=True)]


def sharpened(row: list[float], temperature: float) -> list[float]:
    powers = [p ** (1 / temperature) for p in row]
    return [p / sum(powers) for p in powers]


def cross_entropy(labels: list[float], said: list[float]) -> float:
    return -sum(y * math.log(p) for y, p in zip(labels, said, strict=True))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


ONE_HOT = [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]  # of the labeled images


@pytest.mark.parametrize(("views", "progress"), [(2, 0.1), (3, 1.0)])
def test_mixmatch_by_hand(views: int, progress: float) -> None:
    model, batch = Net(), batch_of(views)
    all_views = [batch.weak, batch.second, *batch.more]
    said = [probabilities(model, view) for view in all_views]
    guesses = [sharpened([mean([view[i][c] for view in said]) for c in range(CLASSES)], 0.7) for i in range(UNLABELED)]
    labels = ONE_HOT + guesses * views

    base = MixMatch(statistics="joined", views=views, temperature=0.7, alpha=0.75, weight=5.0, ramp=0.5)
    loss = base.loss(model, batch, teacher=model, progress=progress)
    images = model.given[-1]
    assert len(images) == LABELED + views * UNLABELED
    partners, labeled, unlabeled = [], [], []
    for own, said_of in enumerate(probabilities(model, images)):
        partner, share = mixture(images[own], own)
        assert share >= 0.5
        partners.append(partner)
        target = mixed(labels, own, partner, share)
        if own < LABELED:
            labeled.append(cross_entropy(target, said_of))
        else:
            unlabeled.append(sum((p - q) ** 2 for p, q in zip(said_of, target, strict=True)) / CLASSES)
    assert sorted(partners) == list(range(len(images)))  # each once, over all parts
    assert loss.labeled.item() == pytest.approx(mean(labeled))
    assert loss.unlabeled.item() == pytest.approx(mean(unlabeled))
    assert loss.total.item() == pytest.approx(mean(labeled) + 5.0 * min(1, progress / 0.5) * mean(unlabeled))


def test_mix_up_by_hand() -> None:
    model, batch = Net(), batch_of(1)
    labels = ONE_HOT + probabilities(model, batch.weak)
    loss = MixUp(statistics="joined", alpha=0.75, weight=0.6).loss(model, batch, teacher=model, progress=0.0)
    images = model.given[-1]
    losses, partners = [], []
    for own, said_of in enumerate(probabilities(model, images)):
        partner, share = mixture(images[own], own)
        assert share >= 0.5
        partners.append(partner)
        losses.append(cross_entropy(mixed(labels, own, partner, share), said_of))
    assert sorted(partners[:LABELED]) == list(range(LABELED))  # of their own kind
    assert sorted(partners[LABELED:]) == list(range(LABELED, LABELED + UNLABELED))
    labeled, unlabeled = mean(losses[:LABELED]), mean(losses[LABELED:])
    assert loss.total.item() == pytest.approx(labeled + 0.6 * unlabeled)


@pytest.mark.parametrize(("views", "progress"), [(1, 0.1), (2, 1.0)])
def test_remixmatch_by_hand(views: int, progress: float) -> None:
    model, batch = Net(), batch_of(1 + views)
    base = ReMixMatch(views, 0.6, 0.75, 1.5, 0.4, 0.3, ramp=0.5, statistics="joined")
    counts = torch.tensor([0, 0, 0, 1, 2, 2])
    memory = base.memory(UNLABELED, CLASSES, model=model, labels=counts)
    prior = [3 / 6, 1 / 6, 2 / 6]
    memory.alignment.recent[:] = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)  # what 128 steps before have said
    ratio = [(p + 1e-6) / (q + 1e-6) for p, q in zip(prior, [0.2, 0.3, 0.5], strict=True)]
    predictions = probabilities(model, batch.weak)
    guesses = []
    for row in predictions:
        weighted = [p * r for p, r in zip(row, ratio, strict=True)]
        guesses.append(sharpened([w / sum(weighted) for w in weighted], 0.6))
    # The order of the parts is ours: labeled, strong views, weak view.
    strong = [batch.second, *batch.more]
    order = [*range(LABELED), *range(LABELED + UNLABELED, LABELED + (1 + views) * UNLABELED)]
    order += range(LABELED, LABELED + UNLABELED)
    labels = ONE_HOT + guesses * (1 + views)
    unmixed = mean([cross_entropy(q, p) for q, p in zip(guesses, probabilities(model, strong[0]), strict=True)])

    loss = base.loss(model, batch, teacher=model, progress=progress, memory=memory)
    images, rotated = model.given[-2:]
    partners, losses = [], []
    for place, said_of in enumerate(probabilities(model, images)):
        partner, share = mixture(images[place], order[place])
        assert share >= 0.5
        partners.append(partner)
        losses.append(cross_entropy(mixed(labels, order[place], partner, share), said_of))
    assert sorted(partners) == list(range(len(order)))
    turning = []
    for image, turned in zip(strong[0], rotated, strict=True):
        (turn,) = [k for k in range(4) if torch.rot90(image, k, (1, 2)).equal(turned)]
        with torch.no_grad():
            logits = memory.head(3 * model.body(turned.unsqueeze(0)))[0]
        turning.append(-math.log(logits.softmax(0)[turn].item()))
    labeled, unlabeled, ramp = mean(losses[:LABELED]), mean(losses[LABELED:]), min(1, progress / 0.5)
    expected = labeled + ramp * (1.5 * unlabeled + 0.4 * unmixed) + 0.3 * mean(turning)
    assert loss.total.item() == pytest.approx(expected)
    newest = [mean(list(column)) for column in zip(*predictions, strict=True)]
    assert memory.alignment.recent[-1].tolist() == pytest.approx(newest)
    assert memory.alignment.recent[-2].tolist() == [0.2, 0.3, 0.5]
    assert float(torch.autograd.grad(loss.total, memory.head.weight)[0].norm()) > 1e-3


def test_guesses_are_constants() -> None:
    """The gradient is that of the loss with the labels written in."""
    model, batch = Net(), batch_of(2)
    base = MixMatch(statistics="joined", weight=3.0, ramp=0.0)
    torch.manual_seed(5)
    loss = base.loss(model, batch, teacher=model, progress=0.0)
    gradients = torch.autograd.grad(loss.total, list(model.parameters()))
    images = model.given[-1]
    labels = torch.tensor(ONE_HOT + loss.used.labels.tolist() * 2, dtype=torch.float64)
    count = len(images)
    matrix = images.flatten(1)[:, :count]  # the mixture of the labels, too
    logits = model(images)
    per_example = nn.functional.cross_entropy(logits[:LABELED], (matrix @ labels)[:LABELED])
    distance = (logits.softmax(1) - matrix @ labels)[LABELED:].square().mean(1).mean()
    written = torch.autograd.grad(per_example + 3.0 * distance, list(model.parameters()))
    for got, wanted in zip(gradients, written, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-13)


class Fixed:
    """A method that answers with labels and weights of its own."""

    class update:
        needs_graph = False

    def __init__(self, answer: Any) -> None:
        self.answer, self.seen = answer, {}

    def refine(self, **seen: Any) -> Any:
        self.seen = seen
        return self.answer


@pytest.mark.parametrize(
    ("base", "views"), [(MixUp(), 1), (MixMatch(ramp=0.0), 2), (ReMixMatch(ramp=0.0, rotation_weight=0.0), 2)]
)
def test_a_method_has_the_last_word_on_labels_and_weights(base: Any, views: int) -> None:
    """Labels of a class each, and a weight for one image alone: all others have no part in the unlabeled loss."""
    model, batch = Net(), batch_of(views)
    labels = torch.eye(CLASSES, dtype=torch.float64)[[1, 1, 1, 1]]
    answer = Refined(labels, torch.tensor([0.0, 2.0, 0.0, 0.0]).double(), torch.tensor(0.25).double())
    method = Fixed(answer)
    memory = base.memory(UNLABELED, CLASSES, model=model, labels=batch.targets)
    loss = base.loss(model, batch, teacher=model, progress=1.0, refiner=Refiner(method), memory=memory)
    assert loss.used.labels.equal(labels)
    assert len(method.seen["unlabeled"].features) == UNLABELED
    assert len(method.seen["holdout"].features) == LABELED
    nothing = Fixed(answer._replace(weights=torch.zeros(UNLABELED).double()))
    memory = base.memory(UNLABELED, CLASSES, model=model, labels=batch.targets)
    without = base.loss(model, batch, teacher=model, progress=1.0, refiner=Refiner(nothing), memory=memory)
    assert without.unlabeled.item() == 0
    assert without.total.item() == pytest.approx(without.labeled.item() + 0.25)
    assert loss.unlabeled.item() > 0


def test_what_remixmatch_cannot_rotate() -> None:
    base, batch = ReMixMatch(), batch_of(2)
    with pytest.raises(ValueError, match=r"rotation_weight 0 for remixmatch where the last layer alone is trained"):
        base.memory(4, 3, model=nn.Linear(4, 3), labels=batch.targets)
    assert ReMixMatch(rotation_weight=0.0).memory(4, 3, model=nn.Linear(4, 3), labels=batch.targets) is not None
    with pytest.raises(ValueError, match=r"memory must be the ReMixMatchMemory that the base's memory\(...\) gave"):
        base.loss(Net(), batch, teacher=Net(), progress=0.0)
    memory = base.memory(4, 3, model=Net(), labels=batch.targets)
    oblong = dataclasses.replace(batch, second=batch.second[..., :4])
    with pytest.raises(ValueError, match=r"images must be square .* to be rotated, got \[4, 1, 5, 4\]"):
        memory.loss(Net(), oblong)
