"""FlexMatch's and FreeMatch's thresholds, and distribution alignment, step by step in plain numbers."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmeta.ssl import UDA, Alignment, FixMatch, FlexMatch, FreeMatch, TrainingBatch
from fastmeta.ssl.flexmatch import Curriculum

CLASSES, IMAGES = 3, 12


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, CLASSES).double()

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.flatten(1))


def steps(count: int) -> list[TrainingBatch]:
    generator = torch.Generator().manual_seed(1)

    def images(number: int) -> Tensor:
        return 2.5 * torch.randn(number, 1, 2, 2, generator=generator, dtype=torch.float64)

    made = []
    for _ in range(count):
        index = torch.randperm(IMAGES, generator=generator)[:5]
        made.append(TrainingBatch(images(3), torch.tensor([0, 2, 1]), images(5), images(5), index))
    return made


def rows(model: nn.Module, images: Tensor) -> list[list[float]]:
    with torch.no_grad():
        return model(images).softmax(1).tolist()


def labeled_loss(model: nn.Module, batch: TrainingBatch) -> float:
    said = rows(model, batch.labeled)
    return -sum(math.log(p[y]) for p, y in zip(said, batch.targets.tolist(), strict=True)) / len(said)


def memory_of(base: Any, model: nn.Module) -> Any:
    return base.memory(IMAGES, CLASSES, model=model, labels=torch.tensor([0, 0, 0, 1, 2]))


MAPPINGS = {
    "convex": lambda x: x / (2 - x),
    "linear": lambda x: x,
    "concave": lambda x: math.log(x + 1) / math.log(2),
}


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("warm_up", [True, False])
def test_flexmatch_by_hand(mapping: str, warm_up: bool) -> None:
    model, base = Net(), FlexMatch(threshold=0.7, weight=0.6, mapping=mapping, warm_up=warm_up)
    memory, last = memory_of(base, model), {}
    left_out = 0
    for batch in steps(6):
        classes = list(last.values())
        counts = [classes.count(c) for c in range(CLASSES)]
        most = max(counts + ([IMAGES - len(last)] if warm_up else []))
        thresholds = [0.7 * MAPPINGS[mapping](n / most if most else 0.0) for n in counts]
        expected = 0.0
        for place, q, p in zip(batch.index.tolist(), rows(model, batch.weak), rows(model, batch.second), strict=True):
            guess = q.index(max(q))
            if max(q) >= thresholds[guess]:
                expected -= math.log(p[guess]) / 5
            else:
                left_out += 1
            if max(q) >= 0.7:
                last[place] = guess
        loss = base.loss(model, batch, teacher=model, progress=0.0, memory=memory)
        assert loss.unlabeled.item() == pytest.approx(expected)
        assert loss.total.item() == pytest.approx(labeled_loss(model, batch) + 0.6 * expected)
    assert left_out
    assert memory.table[:-1].tolist() == [last.get(place, -1) for place in range(IMAGES)]


def test_an_image_that_is_twice_in_a_batch() -> None:
    """The larger of its classes counts; a view of it that is not confident has no say."""
    memory = Curriculum(3, CLASSES)
    sure = torch.eye(CLASSES)
    memory.update(torch.tensor([1, 1, 0, 0]), torch.stack([sure[1], sure[2], sure[1], torch.full((3,), 1 / 3)]), 0.9)
    assert memory.table[:-1].tolist() == [1, 2, -1]


@pytest.mark.parametrize(("fairness", "ceiling"), [(0.0, 1.0), (0.5, 1.0), (0.5, 0.35)])
def test_freematch_by_hand(fairness: float, ceiling: float) -> None:
    model, decay = Net(), 0.7
    base = FreeMatch(weight=0.6, fairness=fairness, decay=decay, ceiling=ceiling)
    memory = memory_of(base, model)
    confidence, mean, histogram = 1 / CLASSES, [1 / CLASSES] * CLASSES, [1 / CLASSES] * CLASSES
    masks = []
    for batch in steps(4):
        weak, strong = rows(model, batch.weak), rows(model, batch.second)
        guesses = [q.index(max(q)) for q in weak]
        confidence = min(ceiling, decay * confidence + (1 - decay) * sum(map(max, weak)) / 5)
        for c in range(CLASSES):
            mean[c] = decay * mean[c] + (1 - decay) * sum(q[c] for q in weak) / 5
            histogram[c] = decay * histogram[c] + (1 - decay) * guesses.count(c) / 5
        mask = [max(q) >= confidence * mean[y] / max(mean) for q, y in zip(weak, guesses, strict=True)]
        masks += mask
        expected = -sum(m * math.log(p[y]) for m, p, y in zip(mask, strong, guesses, strict=True)) / 5
        chosen = [p for m, p in zip(mask, strong, strict=True) if m]
        places = [p.index(max(p)) for p in chosen]
        ratios = {c: sum(p[c] for p in chosen) / places.count(c) for c in set(places)}
        shares = [p / h for p, h in zip(mean, histogram, strict=True)]
        fair = sum(shares[c] / sum(shares) * math.log(ratios[c] / sum(ratios.values())) for c in ratios)

        loss = base.loss(model, batch, teacher=model, progress=0.0, memory=memory)
        assert loss.unlabeled.item() == pytest.approx(expected)
        total = labeled_loss(model, batch) + 0.6 * expected + fairness * fair
        assert loss.total.item() == pytest.approx(total)
    assert sum(masks) > 0
    assert sum(masks) < len(masks) or ceiling < 1
    assert (confidence == ceiling) == (ceiling < 1)
    assert memory.thresholds().tolist() == pytest.approx([confidence * p / max(mean) for p in mean])


def test_fairness_learns_and_nobody_chosen_gives_none() -> None:
    memory = memory_of(FreeMatch(), Net())
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.3]], dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, dtype=torch.float64)

    def value(given: Tensor) -> Tensor:
        return memory.fairness(given.softmax(1), mask)

    assert torch.autograd.gradcheck(value, (logits,))
    nobody = memory.fairness(logits.softmax(1), torch.zeros(2, dtype=torch.float64))
    assert nobody.item() == 0
    assert torch.autograd.grad(nobody, logits)[0].abs().sum() == 0


@pytest.mark.parametrize("prior", ["uniform", "labels"])
@pytest.mark.parametrize("kind", [FixMatch, UDA])
def test_aligned_labels_by_hand(kind: Any, prior: str) -> None:
    """The average is that of the steps before, uniform where there were none."""
    model, base = Net(), kind(threshold=0.6, distribution_alignment=prior)
    memory = memory_of(base, model)
    target = [1 / 3] * 3 if prior == "uniform" else [3 / 5, 1 / 5, 1 / 5]
    seen = [[1 / CLASSES] * CLASSES] * 128
    for batch in steps(3):
        average = [sum(row[c] for row in seen[-128:]) / 128 for c in range(CLASSES)]
        expected, predictions = 0.0, rows(model, batch.weak)
        for q, p in zip(predictions, rows(model, batch.second), strict=True):
            weighted = [a * (t + 1e-6) / (b + 1e-6) for a, t, b in zip(q, target, average, strict=True)]
            label = [w / sum(weighted) for w in weighted]
            if max(label) >= 0.6:
                powers = [float(y == max(label)) if kind is FixMatch else y ** (1 / 0.4) for y in label]
                learned = [y / sum(powers) for y in powers]
                expected -= sum(y * math.log(s) for y, s in zip(learned, p, strict=True)) / 5
        loss = base.loss(model, batch, teacher=model, progress=0.0, memory=memory)
        assert loss.unlabeled.item() == pytest.approx(expected)
        seen.append([sum(q[c] for q in predictions) / 5 for c in range(CLASSES)])
    with pytest.raises(ValueError, match=r"memory must be the Alignment that the base's memory\(...\) gave, got None"):
        base.loss(model, batch, teacher=model, progress=0.0)


def test_alignment_forgets_and_knows_classes_without_labels() -> None:
    batch = steps(1)[0]
    alignment = Alignment("uniform", torch.tensor([0, 0, 2]), 4)
    assert alignment.prior.tolist() == [0.5, 0.0, 0.5, 0.0]  # the others are of foreign images
    for step in range(130):
        alignment.update(torch.full((5, 4), float(step)), batch)
    assert alignment.recent[:, 0].tolist() == [float(step) for step in range(2, 130)]
