import copy
import dataclasses
import math

import pytest
import torch
from short_runs import small
from torch import nn

from fastmeta.data import DataError, UnreadableImage
from fastmeta.ssl import StepLoss
from fastmeta.training import AverageConfig, ExponentialMovingAverage, OptimizerConfig, RunConfig, build
from fastmeta.training.config import EvaluationConfig
from fastmeta.training.evaluation import Evaluator
from fastmeta.training.label_changes import LabelChanges
from fastmeta.training.optimizers import decay_, decayed_parameters, make_optimizer
from fastmeta.training.processes import Processes
from fastmeta.training.step_averages import StepAverages


def trainer_of(digits, **settings):
    return build(RunConfig(**{**small(), **settings}), digits).trainer


def test_runs_of_one_seed_are_paired(digits):
    alone = trainer_of(digits, seed=2)
    refined = trainer_of(digits, seed=2, method="example-weights")
    for first, second in zip(alone.model.parameters(), refined.model.parameters(), strict=True):
        assert first.equal(second)
    for number in (0, 1):
        first, second = alone.batches(number), refined.batches(number)
        for name in ("labeled", "targets", "weak", "second", "index"):
            assert getattr(first, name).equal(getattr(second, name))
        assert first.holdout is None
        assert len(second.holdout) == 30
    other = trainer_of(digits, seed=3)
    assert not other.batches(0).weak.equal(trainer_of(digits, seed=2).batches(0).weak)


def test_batches_come_from_their_own_parts(digits):
    run = build(RunConfig(method="example-weights", labeled_view="weak", views="none", **small()), digits)
    batch = run.trainer.batches(0)
    assert batch.weak.equal(digits.images[run.split.unlabeled[batch.index]])
    assert batch.holdout.equal(digits.images[run.split.holdout])
    assert batch.holdout_targets.equal(digits.targets[run.split.holdout])
    labeled = {
        (image.numpy().tobytes(), int(target)) for image, target in zip(batch.labeled, batch.targets, strict=True)
    }
    source = zip(digits.images[run.split.labeled], digits.targets[run.split.labeled], strict=True)
    assert labeled == {(image.numpy().tobytes(), int(target)) for image, target in source}


@pytest.mark.parametrize("delay", [10.0, 2.0])
def test_average_of_weights_by_hand(delay):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double()
    average = ExponentialMovingAverage(model, AverageConfig(decay=0.7, delay=delay))
    expected = [parameter.detach().clone() for parameter in model.parameters()]
    for update in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
            model[1].running_mean.add_(1)
        average.update()
        decay = min(0.7, (1 + update) / (delay + update))
        expected = [decay * old + (1 - decay) * new for old, new in zip(expected, model.parameters(), strict=True)]
    for got, wanted in zip(average.model.parameters(), expected, strict=True):
        assert torch.allclose(got, wanted, atol=1e-14)
    assert average.model[1].running_mean.equal(model[1].running_mean)
    assert not any(parameter.requires_grad for parameter in average.model.parameters())


def test_averaged_buffers():
    model = nn.BatchNorm1d(3).double()
    average = ExponentialMovingAverage(model, AverageConfig(decay=0.5, warm_up=False, buffers="averaged"))
    model.running_mean += 2
    average.update()
    assert average.model.running_mean.tolist() == [1, 1, 1]


def test_what_a_method_made_of_labels_is_kept_at_its_largest():
    largest = LabelChanges(10)
    before = torch.tensor([[1.0, 0.0]]).expand(3, 2)
    move = torch.tensor([[-1.0, 1.0]])
    largest.add(1, torch.tensor([4, 7, 9]), before, before + torch.tensor([[0.1], [0.3], [0.2]]) * move)
    largest.add(2, torch.tensor([4, 7, 9]), before, before + torch.tensor([[0.9], [0.1], [0.0]]) * move)
    rows = largest.largest(2)
    assert [(row["index"], row["step"], row["before"], row["after"]) for row in rows] == [(4, 2, 0, 1), (7, 1, 0, 0)]
    assert rows[0]["confidence_after"] == pytest.approx(0.9)
    again = LabelChanges(10)
    again.load_state_dict(largest.state_dict())
    assert again.largest(10) == largest.largest(10)
    assert len(again.largest(10)) == 3


def test_the_examples_of_an_outer_loss(digits):
    """Other labeled images than the batch's, in views of their own; or hold-out images with replacement."""
    labeled = trainer_of(digits, method="l2i-published").batches
    first, second = labeled(0), labeled(1)
    assert len(first.holdout) == 10
    assert sorted(first.holdout_targets.tolist()) == list(range(10))  # one label a class: the order alone differs
    assert not first.holdout_targets.equal(first.targets)
    assert not first.holdout_targets.equal(second.holdout_targets)
    assert not torch.cdist(first.holdout.flatten(1), first.labeled.flatten(1)).min(dim=1).values.eq(0).any()

    run = build(RunConfig(method="example-weights-published", holdout_batch=500, **small()), digits)
    batch, other = run.trainer.batches(99), run.trainer.batches(199)
    counts = torch.zeros(30)
    places = run.split.holdout
    for image in batch.holdout:
        counts += (digits.images[places] == image).flatten(1).all(1)
    assert counts.sum() >= 500
    assert counts.min() < counts.max()  # 500 in passes would be 16 or 17 of each
    assert 4 < float((counts - 500 / 30).square().mean()) < 64  # about 500/30 if independent
    assert not batch.holdout.equal(other.holdout)


def test_hold_out_images_come_when_the_method_learns(digits):
    """Passes through them go on where the last update left them."""
    settings = {"interval": 3}
    every, third = (
        trainer_of(digits, method="example-weights", holdout_batch=7, method_settings=chosen).batches
        for chosen in ({}, settings)
    )
    for number in range(7):
        found = third(number)
        if number % 3 == 2:
            assert found.holdout.equal(every(number // 3).holdout)
        else:
            assert found.holdout is None


def test_fresh_batches_are_of_streams_of_their_own(digits):
    settings = {"fresh": True, "interval": 2, "holdout": "part"}
    run = trainer_of(digits, method="example-weights-published", method_settings=settings)
    batch, fresh = run.batches(0), run.batches.fresh(0)
    assert batch.holdout is None
    assert len(fresh.holdout) == 30
    assert set(batch.index.tolist()) != set(fresh.index.tolist())
    assert not fresh.weak.equal(batch.weak)
    with pytest.raises(ValueError, match=r"machine.accumulation must be 1 for a method with batches of its own, got 2"):
        trainer_of(
            digits,
            method="example-weights-published",
            method_settings=settings,
            machine=dataclasses.replace(small()["machine"], accumulation=2),
        )


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("l2i", {"holdout": "all"}, "holdout must be one of batch, labeled, part, drawn, got 'all'"),
        ("l2i", {"two_views": True}, "two_views, imputer and moves_statistics must be left out without own_update"),
        ("l2i", {"fresh": True}, "fresh must be False for L2I with own_update=False: it is for weights"),
        ("l2i", {"scheduled": "speed"}, "scheduled must be a number of L2I that may change, got 'speed'"),
        ("meta-gradient-published", {"scheduled": "rate"}, "scheduled must be a number of MetaGradient"),
        ("meta-gradient-jvp", {"own_update": True}, "own_update must be False for MetaGradient: it has no"),
        ("l2i", {"own_update": True}, "passes must be own with own_update, got 'shared'"),
        ("l2i-alternating", {"hard": True}, "hard must be False for an own_update without two_views, got True"),
        ("l2i", {"hard": "yes"}, "hard must be True or False, got 'yes'"),
        ("label-gradient-alignment", {"ramp_steps": 0}, "ramp_steps must be an int >= 1 or None, got 0"),
        ("example-weights", {"optimizer": "lion"}, "optimizer must be one of masked_adam, adam, sgd, got 'lion'"),
    ],
)
def test_a_loop_that_makes_no_sense_is_refused(digits, method, settings, message):
    with pytest.raises(ValueError, match=f"^method_settings must fit the method: {message}"):
        trainer_of(digits, method=method, method_settings=settings)


def test_an_update_of_the_methods_own_follows_the_bases(digits):
    """One alternating step by hand: the base alone, then the surrogate of L2I at the parameters it left."""
    run = build(RunConfig(method="l2i-alternating", **small()), digits).trainer
    alone = build(RunConfig(**small()), digits).trainer
    for name, value in alone.model.state_dict().items():
        assert run.model.state_dict()[name].equal(value)
    batch = alone.batches(0)
    alone.train_step()
    after_base = copy.deepcopy(alone.model.state_dict())
    refined = run.method.method.refine(
        model=alone.model, unlabeled=batch.weak, holdout=batch.labeled, targets=batch.targets, index=batch.index
    )
    alone.optimizer.zero_grad()
    refined.loss.backward()
    alone.optimizer.step()
    run.train_step()
    for name, value in alone.model.state_dict().items():
        torch.testing.assert_close(run.model.state_dict()[name], value, rtol=1e-6, atol=1e-7)
        if name.endswith("weight"):
            assert not value.equal(after_base[name])


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_decay_by_hand(name):
    """Coupled decay is part of the gradient, decoupled is w (1 - rate decay), on the kernels alone."""
    for decoupled in (False, True):
        model = nn.Linear(3, 2).double()
        kernel, bias = model.weight.detach().clone(), model.bias.detach().clone()
        config = OptimizerConfig(
            name, learning_rate=0.1, momentum=0.0, weight_decay=0.5, decoupled=decoupled, decayed="kernels"
        )
        optimizer = make_optimizer(model, config)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        decay_(list(decayed_parameters(model, config)), config, 0.1)
        expected = kernel - 0.1 * kernel.sign() if name == "adam" and not decoupled else kernel * (1 - 0.05)
        torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-5, atol=1e-6)
        assert model.bias.detach().equal(bias)


def test_parts_of_a_step_add_up(digits):
    """Two parts of half a batch: the mean of the gradients of the two, here of a loss with no batch statistics."""
    settings = {"labeled_batch": 10, "unlabeled_batch": 12, "base": "supervised"}
    run = trainer_of(digits, machine=dataclasses.replace(small()["machine"], accumulation=2), **settings)
    model = copy.deepcopy(run.model)
    batches = [run.batches(0), run.batches(1)]
    assert [len(batch.labeled) for batch in batches] == [5, 5]
    model.train()
    for batch in batches:
        (nn.functional.cross_entropy(model(batch.labeled), batch.targets) / 2).backward()
    optimizer = make_optimizer(model, run.optimizer_config)
    for group in optimizer.param_groups:
        group["lr"] = run.optimizer_config.peak
    optimizer.step()
    run.batches.close()
    run.train_step()
    for got, wanted in zip(run.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(digits):
    run = trainer_of(digits, method="l2i")
    run.train_step()
    before = copy.deepcopy({"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()})
    weak = run.batches.data.views.weak
    broken = dataclasses.replace(run.batches.data.views, weak=lambda images, random: weak(images, random) * torch.nan)
    data = run.batches.data
    run.batches.data = dataclasses.replace(data, views=broken)
    run.train_step()
    assert run.skipped.tolist() == [1, 1]
    for name, value in run.model.state_dict().items():
        assert value.equal(before["model"][name]) or name.endswith("num_batches_tracked"), name
    for place, state in run.optimizer.state_dict()["state"].items():
        assert state["momentum_buffer"].equal(before["optimizer"]["state"][place]["momentum_buffer"])
    run.batches.data = data
    run.train_step()
    assert run.skipped.tolist() == [1, 0]
    assert all(value.isfinite().all() for value in run.model.state_dict().values())


@pytest.mark.parametrize("broken", ["base", "own"])
def test_an_update_of_the_methods_own_that_is_not_finite_is_counted_once(digits, broken, monkeypatch):
    """The other update stands, running statistics stay finite, and a good one does not hide the bad one."""
    run = trainer_of(digits, method="l2i-alternating")
    name = "_base_loss" if broken == "base" else "_method_loss"
    loss = getattr(run, name)

    def without_value(*args):
        found = loss(*args)
        return dataclasses.replace(found, total=found.total * torch.nan) if broken == "base" else found * torch.nan

    monkeypatch.setattr(run, name, without_value)
    before = copy.deepcopy(run.model.state_dict())
    for step in (1, 2):
        run.train_step()
        assert run.skipped.tolist() == [step, step]
    after = run.model.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    assert not all(after[name].equal(before[name]) for name in after if name.startswith("body"))
    assert all(after[name].equal(before[name]) for name in after if "running" in name)


def test_weights_are_chosen_by_validation_error_only(digits):
    run = build(RunConfig(**small()), digits)
    errors = iter([(0.5, 0.1), (0.4, 0.9), (0.4, 0.8), (0.6, 0.0)])
    queue = []

    def error(model, part):
        if not queue:
            queue.extend(next(errors))
        return {f"{part}_error": queue.pop(0)}

    evaluator = run.evaluator
    evaluator._errors = error
    evaluator(1, run.trainer.model, run.trainer.average.model)
    best = evaluator.best
    assert (best["validation_error"], best["test_error"], best["weights"]) == (0.4, 0.9, "average")
    evaluator(2, run.trainer.model, run.trainer.average.model)
    assert (evaluator.best["validation_error"], evaluator.best["test_error"], evaluator.best["step"]) == (0.4, 0.8, 2)


def test_figures_of_the_last_twenty(digits):
    for report, expected in (("mean-of-last-20", 12.5), ("median-of-last-20", 12.5), ("last", 22)):
        config = RunConfig(**{**small(), "evaluation": EvaluationConfig(3, "average", report)})
        run = build(config, digits)
        values = iter(range(100))

        def errors(model, part, values=values):
            return {f"{part}_error": float(next(values)) if part == "test" else 0.5}

        run.evaluator._errors = errors
        for step in range(23):
            run.evaluator(step, run.trainer.model, run.trainer.average.model)
        assert run.evaluator.reported()["test_error"] == expected
        assert run.evaluator.reported()["weights"] == "average"


def test_without_test_images_the_last_twenty_are_of_validation_images(digits):
    config = RunConfig(**{**small(), "evaluation": EvaluationConfig(3, "average", "median-of-last-20")})
    run = build(config, digits)
    without = dataclasses.replace(run.split, test=run.split.test[:0])
    evaluator = Evaluator(config.evaluation, digits, without, run.evaluator.views)
    values = iter(range(100))
    evaluator._errors = lambda model, part: {f"{part}_error": float(next(values))}
    for step in range(23):
        evaluator(step, run.trainer.model, run.trainer.average.model)
    assert evaluator.reported()["validation_error"] == 12.5
    assert evaluator.reported()["test_error"] is None
    none = dataclasses.replace(without, validation=without.test)
    with pytest.raises(ValueError, match=r"evaluation\.report must be last without test or validation images"):
        Evaluator(config.evaluation, digits, none, run.evaluator.views)


class _Broken:
    def __init__(self, images, places):
        self.images, self.broken = images, set(places.tolist())

    def __getattr__(self, name):
        return getattr(self.images, name)

    def get(self, places):
        for place in places.tolist():
            if place in self.broken:
                raise UnreadableImage(place, self.images.describe(place), "broken")
        return self.images.get(places)


def test_an_error_of_a_few_of_the_images_is_none(digits):
    run = build(RunConfig(**small()), digits)
    test = run.split.test
    for count, allowed in ((1, True), (4, True), (5, False), (len(test), False)):
        images = _Broken(digits, test[:count])
        evaluator = Evaluator(run.config.evaluation, images, run.split, run.evaluator.views)
        if allowed:
            rest = dataclasses.replace(run.split, test=test[count:])
            expected = Evaluator(run.config.evaluation, digits, rest, run.evaluator.views)
            found = evaluator(1, run.trainer.model, run.trainer.average.model)
            assert found == expected(1, run.trainer.model, run.trainer.average.model)
        else:
            with pytest.raises(DataError, match=f"{count} of {len(test)} test images cannot be read"):
                evaluator(1, run.trainer.model, run.trainer.average.model)


def test_a_step_without_a_finite_loss_is_in_no_mean():
    averages = StepAverages(Processes(), torch.device("cpu"))
    nothing = torch.full((1,), -1)
    for total in (1.0, math.nan, 3.0, math.inf):
        value = torch.tensor(total)
        averages.add(StepLoss(value, value, value), nothing, 1.0)
    assert averages.read() == {"loss": 2.0, "loss_labeled": 2.0, "loss_unlabeled": 2.0, "confident": 0.0}
    averages.add(StepLoss(*[torch.tensor(math.nan)] * 3), nothing, 1.0)
    assert averages.read() == {}
