"""CTAugment's rates as a part of training: what moves them, on any number of processes, and after a resume."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from short_runs import assert_same_run, small
from small_trainers import STEPS, Net, Noise, data
from torch import Tensor

from fastmeta.data import Images, KeyedRandom, Stream, Views
from fastmeta.data.augment import CTAugment
from fastmeta.data.augment.ctaugment import OPERATIONS
from fastmeta.ops.process_group import Group
from fastmeta.ssl import FixMatch
from fastmeta.training import AugmentationConfig, AverageConfig, RunConfig, Trainer, build, train
from fastmeta.training.config import MachineConfig, OptimizerConfig
from fastmeta.training.files import read_json
from fastmeta.training.processes import Processes

BATCH = 6
RESCALE = list(OPERATIONS).index("rescale")


def trainer(group: Group = None, normalized: bool = False, **machine: Any) -> Trainer:
    torch.manual_seed(1)
    made = data(BATCH)
    policy = CTAugment(6, Noise(0.1), threshold=1.0, decay=0.5)
    return Trainer(
        Net(normalized).double(),
        dataclasses.replace(made, views=Views(made.views.weak, policy, made.views.plain, policy)),
        base=FixMatch(0.5),
        steps=STEPS,
        optimizer=OptimizerConfig(learning_rate=0.1),
        average=AverageConfig(decay=0.9),
        machine=MachineConfig(**machine),
        processes=Processes(group),
    )


def rates_of(run: Trainer) -> Tensor:
    assert run.probes is not None
    return run.probes.policy.rates


def trained(group: Group = None, **machine: Any) -> dict[str, Any]:
    run = trainer(group, **machine)
    for _ in range(STEPS + 1):
        run.train_step()
    return {"rates": rates_of(run).clone(), "model": run.model.state_dict()}


def test_a_step_by_hand() -> None:
    """The averaged weights of before the step, in evaluation mode, on probes that are drawn evenly."""
    run = trainer(normalized=True)
    run.train_step()
    mean = run.average.model.body[1].running_mean.clone()
    batch = run.batches(1)
    net = trainer(normalized=True).model
    net.load_state_dict(run.average.model.state_dict())
    with torch.no_grad():
        recognized = net.eval()(batch.probe).softmax(dim=1)[torch.arange(BATCH), batch.targets]
    before = rates_of(run).clone()
    run.batches.close()
    run.train_step()
    assert not run.average.model.body[1].running_mean.equal(mean)  # copied from the model, which was trained

    expected = before.clone()
    random = KeyedRandom(0, "labeled", "probe", torch.arange(BATCH, 2 * BATCH))
    assert run.probes is not None
    drawn = run.probes.policy._draw(random, even=True, device=before.device)
    for row in range(BATCH):
        for operation, (bin_of, filter_of) in zip(drawn.operations[row], drawn.bins[row], strict=True):
            expected[operation, bin_of] = 0.5 * expected[operation, bin_of] + 0.5 * recognized[row]
            if operation == RESCALE:
                expected[-1, filter_of] = 0.5 * expected[-1, filter_of] + 0.5 * recognized[row]
    torch.testing.assert_close(rates_of(run), expected, rtol=1e-12, atol=1e-12)
    assert not expected.equal(before)


def test_probes_are_the_labeled_images_with_even_magnitudes() -> None:
    run = trainer()
    rates_of(run)[:, 1:] = 0  # of the strong view, the first bins alone are left
    stream = Stream(run.data.images, run.data.split.labeled, batch_size=BATCH, seed=0, name="labeled")
    for number in (0, 1):
        rows = next(stream)
        expected = CTAugment(6, Noise(0.1)).probe(rows.images, KeyedRandom(0, "labeled", "probe", rows.keys))
        found = run.batches(number).probe
        assert found is not None
        assert found.equal(expected)


@pytest.mark.parametrize("world", [2, 3])
def test_rates_on_processes_are_those_of_one(world: int) -> None:
    alone = trained()
    assert bool((alone["rates"] < 1).any())
    for found in forked.run(trained, world):
        torch.testing.assert_close(found["rates"], alone["rates"], rtol=1e-10, atol=1e-10)
        for name, value in alone["model"].items():
            torch.testing.assert_close(found["model"][name], value, rtol=1e-9, atol=1e-9)


def test_rates_of_a_step_in_parts() -> None:
    whole, parts = trainer(), trainer(accumulation=2)
    for run in (whole, parts):
        run.train_step()
    torch.testing.assert_close(rates_of(parts), rates_of(whole), rtol=1e-10, atol=1e-10)


def test_a_step_without_a_finite_loss_leaves_the_rates() -> None:
    run = trainer()
    run.train_step()
    before = rates_of(run).clone()
    run.base = FixMatch(0.5, weight=float("nan"))
    run.train_step()
    assert run.skipped.tolist() == [1, 1]
    assert rates_of(run).equal(before)
    run.base = FixMatch(0.5)
    run.train_step()
    assert not rates_of(run).equal(before)


class Killed(BaseException):
    pass


def test_a_resumed_run_goes_on_with_its_rates(tmp_path: Path, digits: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    """At this threshold the best bins alone are drawn, so that other rates would be other images at once."""
    monkeypatch.setattr(importlib.import_module("fastmeta.training.train"), "write_report", lambda *_: None)
    augmentation = AugmentationConfig(strong="ctaugment", threshold=1.0)
    config = RunConfig(seed=1, augmentation=augmentation, labeled_view="weak", **small())
    train(config, tmp_path / "whole", images=digits)

    def kill(step: int) -> None:
        if step == 7:
            raise Killed

    with pytest.raises(Killed):
        train(config, tmp_path / "killed", images=digits, on_step=kill)
    train(config, tmp_path / "killed", images=digits)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    rates = read_json(tmp_path / "whole" / "details.json")["rates"]
    assert {name: len(row) for name, row in rates.items() if len(row) != 17} == {
        "identity": 1,
        "posterize": 8,
        "filter of rescale": 6,
    }
    assert 0 < min(rates["rotate"]) < 1


def test_rates_that_do_not_move_need_no_probes(digits: Images) -> None:
    augmentation = AugmentationConfig(strong="ctaugment", adapt=False)
    run = build(RunConfig(augmentation=augmentation, **small()), digits).trainer
    assert run.probes is None
    assert run.batches(0).probe is None
    assert run.state_dict()["augmentation"] is None


def test_features_that_are_computed_once_have_no_moving_rates(digits: Images, tmp_path: Path) -> None:
    net = build(RunConfig(**small()), digits).trainer.model
    torch.save(net.state_dict(), tmp_path / "net.pt")
    config = RunConfig(
        augmentation=AugmentationConfig(strong="ctaugment"),
        trainable="head",
        pretrained=str(tmp_path / "net.pt"),
        **small(),
    )
    with pytest.raises(ValueError, match=r"augmentation.adapt must be False with trainable head"):
        build(config, digits)
