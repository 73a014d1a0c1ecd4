import dataclasses
import math

import pytest
import torch
from torch import nn

from fastmeta import Refined
from fastmeta.ssl import BASES, FixMatch, MeanTeacher, PseudoLabel, Refiner, Supervised, TrainingBatch
from fastmeta.ssl.base import frozen_statistics
from fastmeta.ssl.labels import harden, ramp_up

CLASSES = 3


def net(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, CLASSES)).double()
    with torch.no_grad():
        model[1].weight.mul_(2)  # so that some predictions are confident and some are not
    return model


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)

    def images(count):
        return 2 * torch.randn(count, 1, 2, 2, generator=generator, dtype=torch.float64)

    return TrainingBatch(
        labeled=images(4),
        targets=torch.tensor([0, 1, 2, 1]),
        weak=images(6),
        second=images(6),
        index=torch.tensor([5, 0, 3, 9, 1, 2]),
    )


# The definitions again, one example and one float at a time.
def probabilities(model, image):
    weight, bias = model[1].weight.tolist(), model[1].bias.tolist()
    pixels = image.flatten().tolist()
    logits = [sum(w * x for w, x in zip(row, pixels, strict=True)) + b for row, b in zip(weight, bias, strict=True)]
    total = sum(math.exp(logit) for logit in logits)
    return [math.exp(logit) / total for logit in logits]


def cross_entropy(model, images, labels):
    losses = [-math.log(probabilities(model, image)[label]) for image, label in zip(images, labels, strict=True)]
    return sum(losses) / len(losses)


def hard_label_loss(model, labeling, learning, threshold):
    total = 0.0
    for source, image in zip(labeling, learning, strict=True):
        guess = probabilities(model, source)
        if max(guess) >= threshold:
            total -= math.log(probabilities(model, image)[guess.index(max(guess))])
    return total / len(labeling)


def squared_loss(model, teacher, batch):
    total = 0.0
    for source, image in zip(batch.weak, batch.second, strict=True):
        pair = zip(probabilities(model, image), probabilities(teacher, source), strict=True)
        total += sum((p - q) ** 2 for p, q in pair)
    return total / len(batch.weak)


def test_supervised_is_the_cross_entropy(batch):
    model = net(0)
    loss = Supervised().loss(model, batch, teacher=net(1), progress=0.0)
    assert loss.total.item() == pytest.approx(cross_entropy(model, batch.labeled, batch.targets))


@pytest.mark.parametrize("threshold", [0.0, 0.6, 1.1])
def test_fixmatch_by_hand(batch, threshold):
    model = net(0)
    loss = FixMatch(threshold=threshold, weight=0.7).loss(model, batch, teacher=net(1), progress=0.0)
    labeled = cross_entropy(model, batch.labeled, batch.targets)
    unlabeled = hard_label_loss(model, batch.weak, batch.second, threshold)
    assert (unlabeled > 0) == (threshold <= 1)
    assert loss.total.item() == pytest.approx(labeled + 0.7 * unlabeled)
    assert loss.unlabeled.item() == pytest.approx(unlabeled)


@pytest.mark.parametrize("progress", [0.0, 0.25, 0.5, 0.9])
def test_pseudo_label_by_hand(batch, progress):
    model = net(0)
    loss = PseudoLabel(threshold=0.6, weight=2.0, ramp=0.5).loss(model, batch, teacher=net(1), progress=progress)
    ramp = math.exp(-5 * (1 - min(1, progress / 0.5)) ** 2)
    expected = cross_entropy(model, batch.labeled, batch.targets)
    expected += 2.0 * ramp * hard_label_loss(model, batch.weak, batch.weak, 0.6)
    assert loss.total.item() == pytest.approx(expected)


@pytest.mark.parametrize("progress", [0.1, 0.9])
def test_mean_teacher_by_hand(batch, progress):
    model, teacher = net(0), net(1)
    loss = MeanTeacher(weight=3.0, ramp=0.4).loss(model, batch, teacher=teacher, progress=progress)
    ramp = math.exp(-5 * (1 - min(1, progress / 0.4)) ** 2)
    expected = cross_entropy(model, batch.labeled, batch.targets) + 3.0 * ramp * squared_loss(model, teacher, batch)
    assert loss.total.item() == pytest.approx(expected)


@pytest.mark.parametrize("base", [FixMatch(threshold=0.5), PseudoLabel(threshold=0.5, ramp=0.1), MeanTeacher(ramp=0.1)])
def test_labels_are_constants_of_the_unlabeled_loss(base, batch):
    # the gradient equals that of the loss with the imputed labels written in as numbers
    model, teacher = net(0), net(1)
    loss = base.loss(model, batch, teacher=teacher, progress=0.5)
    gradient = torch.autograd.grad(loss.total, list(model.parameters()))
    learning = batch.weak if base.second_view is None else batch.second
    logits = model(learning)
    labels = loss.used.labels
    if isinstance(base, MeanTeacher):
        per_example = (logits.softmax(1) - labels).square().sum(1)
    else:
        per_example = -(labels * logits.log_softmax(1)).sum(1)
    written = nn.functional.cross_entropy(model(batch.labeled), batch.targets)
    written = written + base.weight * (loss.used.weights * per_example).mean()
    for got, expected in zip(gradient, torch.autograd.grad(written, list(model.parameters())), strict=True):
        assert torch.allclose(got, expected, atol=1e-12)


class Spy:
    """A method that records what it is given and answers with fixed values."""

    def __init__(self, labels, weights, loss):
        self.answer = Refined(labels, weights, loss)
        self.seen = {}

    def refine(self, **seen):
        self.seen = seen
        return self.answer


def spy(count=6):
    labels = torch.zeros(count, CLASSES, dtype=torch.float64)
    labels[:, 2] = 1
    return Spy(labels, torch.linspace(0, 2, count, dtype=torch.float64), torch.tensor(0.25, dtype=torch.float64))


@pytest.mark.parametrize("name", ["fixmatch", "pseudo-label"])
def test_a_method_replaces_labels_and_weights_and_adds_its_loss(name, batch):
    model, method = net(0), spy()
    base = BASES[name](threshold=0.9)
    loss = base.loss(model, batch, teacher=net(1), progress=1.0, refiner=Refiner(method))
    learning = batch.second if name == "fixmatch" else batch.weak
    weights = method.answer.weights.tolist()
    unlabeled = sum(
        weight * -math.log(probabilities(model, image)[2]) for weight, image in zip(weights, learning, strict=True)
    )
    expected = cross_entropy(model, batch.labeled, batch.targets) + unlabeled / len(weights) + 0.25
    assert loss.total.item() == pytest.approx(expected)


def test_a_method_sees_features_labels_and_places(batch):
    model, method = net(0), spy()
    FixMatch().loss(model, batch, teacher=net(1), progress=0.0, refiner=Refiner(method))
    assert method.seen["unlabeled"].features.equal(batch.weak.flatten(1))
    assert method.seen["holdout"].features.equal(batch.labeled.flatten(1))
    assert method.seen["targets"].equal(batch.targets)
    assert method.seen["index"].equal(batch.index)
    assert method.seen["labels"].requires_grad
    assert method.seen["mask"] is None
    assert method.seen["labeled"] is None


def test_a_method_on_the_learned_view_gets_hard_labels_and_mask(batch):
    model, method = net(0), spy()
    FixMatch(threshold=0.6).loss(
        model, batch, teacher=net(1), progress=0.0, refiner=Refiner(method, view="learned", hard=True)
    )
    hard, mask = harden(model(batch.weak).softmax(1), 0.6)
    assert 0 < mask.sum() < len(mask)
    assert method.seen["unlabeled"].features.equal(batch.second.flatten(1))
    assert method.seen["labels"].equal(hard)
    assert method.seen["mask"].equal(mask)


def test_hold_out_images_replace_the_labeled_batch_and_leave_statistics_alone(batch):
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(4, CLASSES)).double()
    holdout = torch.randn(5, 1, 2, 2, dtype=torch.float64)
    targets = torch.tensor([0, 1, 2, 0, 1])
    method = spy()
    with_holdout = dataclasses.replace(batch, holdout=holdout, holdout_targets=targets)
    FixMatch().loss(model, with_holdout, teacher=model, progress=0.0, refiner=Refiner(method))
    assert len(method.seen["holdout"].features) == 5
    assert method.seen["targets"].equal(targets)
    assert method.seen["labeled_targets"].equal(batch.targets)
    everything = torch.cat([batch.labeled, batch.weak, batch.second])
    assert torch.allclose(model[0].running_mean, 0.1 * everything.mean(dim=(0, 2, 3)))


def test_mean_teacher_gives_a_method_the_teachers_labels_with_the_students_derivative(batch):
    model, teacher, method = net(0), net(1), spy()
    MeanTeacher().loss(model, batch, teacher=teacher, progress=0.0, refiner=Refiner(method))
    labels = method.seen["labels"]
    assert torch.allclose(labels, teacher(batch.weak).softmax(1))
    cotangent = torch.randn_like(labels)
    got = torch.autograd.grad((labels * cotangent).sum(), model[1].weight)[0]
    expected = torch.autograd.grad((model(batch.second).softmax(1) * cotangent).sum(), model[1].weight)[0]
    assert torch.allclose(got, expected)


def test_supervised_has_nothing_to_refine(batch):
    with pytest.raises(ValueError, match="the supervised base imputes no labels"):
        Supervised().loss(net(0), batch, teacher=net(1), progress=0.0, refiner=Refiner(spy()))


def test_harden_keeps_the_confidence_limit_inclusive():
    labels, mask = harden(torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.75, 0.05], [0.1, 0.2, 0.7]]), 0.75)
    assert labels.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert mask.tolist() == [0, 1, 0]


def test_ramp_up_is_flat_after_its_length():
    values = [ramp_up(progress / 100, 0.4) for progress in range(100)]
    assert values == sorted(values)
    assert values[0] == pytest.approx(math.exp(-5))
    assert values[40:] == [1.0] * 60


def test_frozen_statistics_come_back():
    layer = nn.BatchNorm1d(2)
    with frozen_statistics(layer):
        layer(torch.randn(8, 2))
    assert layer.running_mean.tolist() == [0, 0]
    layer(torch.ones(8, 2))
    assert layer.running_mean.tolist() == pytest.approx([0.1, 0.1])
