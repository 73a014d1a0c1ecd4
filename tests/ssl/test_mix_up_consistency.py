"""Mix-up and consistency against their definition, example by example."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

from fastmeta import L2I, MetaGradient
from fastmeta.ssl import MixUpConsistency, Refiner, TrainingBatch, kl_divergence, mix_up

CLASSES = 3


def net() -> nn.Sequential:
    """Its modes differ: by batch statistics, which a moved running average is no longer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, CLASSES)).double()
    with torch.no_grad():
        model[2].running_mean += 0.3
    return model


@pytest.fixture
def batch(generator: torch.Generator) -> TrainingBatch:
    labeled, weak = (torch.randn(4, 1, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    return TrainingBatch(labeled, torch.tensor([0, 2, 1, 2]), weak, None, torch.arange(4))


def rows(model: nn.Module, images: torch.Tensor) -> list[list[float]]:
    return model(images).softmax(1).tolist()


@pytest.mark.parametrize("progress", [0.0, 0.05, 0.5])
def test_by_hand(batch, progress):
    model = net()
    labels = rows(copy.deepcopy(model).eval(), batch.weak)
    torch.manual_seed(3)
    targets = nn.functional.one_hot(batch.targets, CLASSES).double()
    mixed = mix_up(batch.labeled, targets, batch.weak, torch.tensor(labels, dtype=torch.float64), alpha=0.4)
    said, again = rows(copy.deepcopy(model), mixed.inputs), rows(copy.deepcopy(model), batch.weak)
    divergence = consistency = 0.0
    for y, p in zip(mixed.targets.tolist(), said, strict=True):
        divergence += sum(a * math.log(a / b) for a, b in zip(y, p, strict=True) if a > 0) / 4
    for q, p in zip(labels, again, strict=True):
        consistency += sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) / 4

    torch.manual_seed(3)
    loss = MixUpConsistency(alpha=0.4, weight=2.0, ramp=0.1).loss(model, batch, teacher=model, progress=progress)
    assert loss.labeled.item() == pytest.approx(divergence)
    assert loss.unlabeled.item() == pytest.approx(consistency)
    assert loss.total.item() == pytest.approx(divergence + 2.0 * min(1.0, progress / 0.1) * consistency)
    assert loss.imputed.tolist() == [pytest.approx(row) for row in labels]
    assert model.training


def test_imputed_labels_are_constants(batch):
    """The gradient is that of the loss with the labels written in as numbers."""
    model = net()
    with torch.no_grad():
        labels = copy.deepcopy(model).eval()(batch.weak).softmax(1)
    torch.manual_seed(3)
    targets = nn.functional.one_hot(batch.targets, CLASSES).double()
    mixed = mix_up(batch.labeled, targets, batch.weak, labels, alpha=1.0)
    divergence = nn.functional.kl_div(model(mixed.inputs).log_softmax(1), mixed.targets, reduction="batchmean")
    written = divergence + (model(batch.weak).softmax(1) - labels).square().sum(1).mean()
    expected = torch.autograd.grad(written, list(model.parameters()))
    model = net()  # with the running statistics from before
    torch.manual_seed(3)
    loss = MixUpConsistency(ramp=0.0).loss(model, batch, teacher=model, progress=0.0)
    gradients = torch.autograd.grad(loss.total, list(model.parameters()))
    for got, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def test_the_methods_labels_are_learned_and_own_passes_are_the_shared_ones(batch):
    """At the last layer, and in the evaluation mode of both."""
    results = []
    for passes in ("shared", "own"):
        torch.manual_seed(3)
        model = net()
        refiner = Refiner(MetaGradient(step=0.5, statistics="running"), passes=passes)
        loss = MixUpConsistency().loss(model, batch, teacher=model, progress=0.5, refiner=refiner)
        assert not torch.allclose(loss.used.labels, loss.imputed, atol=1e-4)
        results.append((loss, torch.autograd.grad(loss.total, list(model.parameters()))))
    (shared, shared_gradients), (own, own_gradients) = results
    torch.testing.assert_close(own.total, shared.total, rtol=1e-10, atol=1e-12)
    for one, other in zip(own_gradients, shared_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_labels_below_zero_have_the_gradient_of_the_cross_entropy(batch):
    """As a step on labels that is not projected leaves them; the entropy would be no number."""
    logits = torch.randn(3, CLASSES, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1.2, -0.3, 0.1], [0.5, 0.5, 0.0], [-0.1, 0.4, 0.7]], dtype=torch.float64)
    loss = kl_divergence(logits, labels)
    assert loss.isfinite()
    expected = (labels.sum(1, keepdim=True) * logits.detach().softmax(1) - labels) / 3
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], expected)


def test_a_pull_back_reaches_the_imputer(batch):
    model = net()
    loss = MixUpConsistency().loss(model, batch, teacher=model, progress=0.5, refiner=Refiner(L2I("V2")))
    pulled = torch.autograd.grad(loss.used.loss, model[1].weight)[0]
    assert float(pulled.norm()) > 1e-6


@pytest.mark.parametrize(("labeled", "unlabeled"), [(4, 3), (2, 4)])
def test_the_smaller_batch_goes_round(batch, labeled, unlabeled):
    """As if its images came again in the batch: with batch statistics that see each of them as often."""
    smaller = dataclasses.replace(
        batch, labeled=batch.labeled[:labeled], targets=batch.targets[:labeled], weak=batch.weak[:unlabeled]
    )
    again = [torch.arange(4) % size for size in (labeled, unlabeled)]
    repeated = dataclasses.replace(
        smaller, labeled=smaller.labeled[again[0]], targets=smaller.targets[again[0]], weak=smaller.weak[again[1]]
    )
    found = []
    for given in (smaller, repeated):
        torch.manual_seed(3)
        found.append(MixUpConsistency().loss(net(), given, teacher=net(), progress=0.0).labeled.item())
    assert found[0] == pytest.approx(found[1])
