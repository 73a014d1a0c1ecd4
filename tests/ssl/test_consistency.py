"""The Pi-model and UDA against their definitions, and whose batch statistics a part of a batch has."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from fastmeta.ssl import UDA, PiModel, TrainingBatch
from fastmeta.ssl.labels import sharpen
from fastmeta.ssl.passes import forward_parts

CLASSES = 3


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, CLASSES)).double()


@pytest.fixture
def batch(generator: torch.Generator) -> TrainingBatch:
    def images(count: int) -> Tensor:
        return 3 * torch.randn(count, 1, 2, 2, generator=generator, dtype=torch.float64)

    return TrainingBatch(images(4), torch.tensor([0, 1, 2, 1]), images(6), images(6), torch.arange(6))


def rows(model: nn.Module, images: Tensor) -> list[list[float]]:
    with torch.no_grad():
        return model(images).softmax(1).tolist()


def labeled_losses(model: nn.Module, batch: TrainingBatch) -> list[float]:
    return [-math.log(p[y]) for p, y in zip(rows(model, batch.labeled), batch.targets.tolist(), strict=True)]


@pytest.mark.parametrize("progress", [0.1, 0.9])
def test_pi_model_by_hand(model: nn.Module, batch: TrainingBatch, progress: float) -> None:
    first, second = rows(model, batch.weak), rows(model, batch.second)
    distance = entropy = 0.0
    for p, q in zip(first, second, strict=True):
        distance += sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) / CLASSES / 6
        entropy -= sum(b * math.log(b) for b in q) / 6
    base = PiModel(weight=7.0, ramp=0.4, entropy_weight=0.2)
    loss = base.loss(model, batch, teacher=model, progress=progress)
    ramp = math.exp(-5 * (1 - min(1, progress / 0.4)) ** 2)
    labeled = sum(labeled_losses(model, batch)) / 4
    assert loss.total.item() == pytest.approx(labeled + ramp * 7.0 * distance + 0.2 * entropy)


@pytest.mark.parametrize("learns", ["both", "second"])
def test_which_views_of_the_pi_model_learn(model: nn.Module, batch: TrainingBatch, learns: str) -> None:
    base = PiModel(weight=7.0, ramp=0.0, learns=learns)
    loss = base.loss(model, batch, teacher=model, progress=0.0)
    first, second = model(batch.weak).softmax(1), model(batch.second).softmax(1)
    distance = (second - (first if learns == "both" else first.detach())).square().mean()
    written = nn.functional.cross_entropy(model(batch.labeled), batch.targets) + 7.0 * distance
    gradients = (torch.autograd.grad(value, list(model.parameters())) for value in (loss.total, written))
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-13)


def progress_of(annealing: str, limit: float) -> float:
    """When the schedule is at ``limit``."""
    risen = (limit - 1 / CLASSES) / (1 - 1 / CLASSES)
    return {"linear": risen, "log": -math.log(1 - risen) / 5, "exp": 1 + math.log(risen) / 5, "none": 0.4}[annealing]


@pytest.mark.parametrize("annealing", ["none", "linear", "log", "exp"])
def test_uda_by_hand(model: nn.Module, batch: TrainingBatch, annealing: str) -> None:
    """Half of the unlabeled images are below the threshold, and annealing leaves two of four labeled ones."""
    batch = dataclasses.replace(batch, targets=model(batch.labeled).argmax(1))
    weak = rows(model, batch.weak)
    threshold = sum(sorted(map(max, weak))[2:4]) / 2
    base = UDA(threshold=threshold, temperature=0.4, weight=0.8, annealing=annealing)
    unlabeled = 0.0
    for q, p in zip(weak, rows(model, batch.second), strict=True):
        if max(q) >= threshold:
            powers = [a ** (1 / 0.4) for a in q]
            unlabeled -= sum(a / sum(powers) * math.log(b) for a, b in zip(powers, p, strict=True)) / 6
    losses = labeled_losses(model, batch)
    limit = sum(sorted(math.exp(-loss) for loss in losses)[1:3]) / 2
    left = losses if annealing == "none" else [loss for loss in losses if math.exp(-loss) <= limit]
    assert len(left) == (4 if annealing == "none" else 2)
    loss = base.loss(model, batch, teacher=model, progress=progress_of(annealing, limit))
    assert loss.labeled.item() == pytest.approx(sum(left) / len(left))
    assert loss.unlabeled.item() == pytest.approx(unlabeled)
    assert loss.total.item() == pytest.approx(sum(left) / len(left) + 0.8 * unlabeled)


def test_annealing_may_leave_no_labeled_image(model: nn.Module, batch: TrainingBatch) -> None:
    batch = dataclasses.replace(batch, targets=model(batch.labeled).argmax(1))
    loss = UDA(annealing="linear").loss(model, batch, teacher=model, progress=0.0)  # at 1/3, which all have
    assert loss.labeled.item() == 0.0


@pytest.mark.parametrize("temperature", [0.4, 0.5])
def test_labels_below_0_are_sharpened_as_0(temperature: float) -> None:
    given = torch.tensor([[0.43, 0.67, -0.1], [1.2, -0.1, -0.1], [0.0, 0.0, 0.0], [-0.2, -0.1, -0.3]])
    a, b = 0.43 ** (1 / temperature), 0.67 ** (1 / temperature)
    expected = torch.tensor([[a / (a + b), b / (a + b), 0], [1, 0, 0], [0, 0, 0], [0, 0, 0]])
    torch.testing.assert_close(sharpen(given, temperature), expected)


def test_batch_statistics(generator: torch.Generator) -> None:
    """Interleaved by the rows of the MixMatch repository's batches: the first has a third of each part."""
    layer = nn.BatchNorm1d(2).double()
    parts = [torch.randn(count, 2, generator=generator, dtype=torch.float64) for count in (6, 7, 9)]
    a, b, c = parts

    def normalized(rows: Tensor) -> Tensor:
        return (rows - rows.mean(0)) / (rows.var(0, unbiased=False) + layer.eps).sqrt()

    first = torch.cat([a[:2], b[2:4], c[6:]])
    second = torch.cat([b[:2], a[2:4], b[4:]])
    third = torch.cat([c[:3], c[3:6], a[4:]])
    one, two, three = map(normalized, (first, second, third))
    expected = {
        "joined": [*normalized(torch.cat(parts)).split([6, 7, 9])],
        "separate": [normalized(part) for part in parts],
        "interleaved": [
            torch.cat([one[:2], two[2:4], three[6:]]),
            torch.cat([two[:2], one[2:4], two[4:]]),
            torch.cat([three[:3], three[3:6], one[4:]]),
        ],
    }
    moved_by = {"joined": torch.cat(parts), "separate": a, "interleaved": first}
    for statistics, wanted in expected.items():
        model = copy.deepcopy(layer)
        for got, part in zip(forward_parts(model, parts, statistics), wanted, strict=True):
            torch.testing.assert_close(got, part, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(model.running_mean, 0.1 * moved_by[statistics].mean(0))
        assert model.track_running_stats
