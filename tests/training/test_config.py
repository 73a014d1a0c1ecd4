import dataclasses
import json
import math

import pytest
import torch

from fastmeta.ssl import BASES
from fastmeta.training import (
    AugmentationConfig,
    AverageConfig,
    EvaluationConfig,
    MachineConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    SplitConfig,
    from_dict,
    resolve,
)
from fastmeta.training.build import build
from fastmeta.training.optimizers import rate_at
from fastmeta.training.recipes import BASE_RECIPES, METHODS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"base": "comatch"},
            "base must be one of supervised, pseudo-label, pi-model, mean-teacher, vat, .*, got 'comatch'",
        ),
        ({"method": "maml"}, "method must be one of none, l2i, .*, got 'maml'"),
        ({"base": "supervised", "method": "l2i"}, "method must be none for base supervised .*, got 'l2i'"),
        ({"labels_per_class": 0}, "labels_per_class must be at least 1, got 0"),
        ({"steps": -1}, "steps must be at least 1, got -1"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"base_settings": {"tau": 0.5}}, "base_settings must be among threshold, .* for base fixmatch, got .tau."),
        ({"method_settings": {"weight": 2}}, "method_settings must be left out without a method, got .*weight"),
        ({"base_settings": {"threshold": 7}}, "base_settings must have a threshold of at most 1, got 7"),
        ({"base_settings": {"weight": "x"}}, "base_settings must have a number of at least 0 for weight, got .x."),
        (
            {"base": "mixmatch", "method": "label-gradient-alignment-published"},
            "method_settings must have ramp_steps None for base mixmatch, .* got",
        ),
        (
            {"base_settings": {"statistics": "mixed"}},
            "must have one of joined, separate, interleaved for statistics, got 'mixed'",
        ),
        ({"base": "uda", "base_settings": {"temperature": 0}}, "base_settings must have a temperature above 0, got 0"),
        ({"base": "freematch", "base_settings": {"decay": 2}}, "base_settings must have a decay of at most 1, got 2"),
        (
            {"base": "mixmatch", "base_settings": {"views": 1}},
            "base_settings must have an integer of at least 2 for views, got 1",
        ),
        (
            {"base": "flexmatch", "base_settings": {"warm_up": 1}},
            "base_settings must have True or False for warm_up, got 1",
        ),
    ],
)
def test_settings_name_what_is_wrong(settings, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(**settings)


@pytest.mark.parametrize(
    ("name", "part", "message"),
    [
        ("optimizer", OptimizerConfig(learning_rate=math.nan), "learning_rate must be above 0 and finite, got nan"),
        ("optimizer", OptimizerConfig(weight_decay=-1.0), "weight_decay must be at least 0 and finite, got -1.0"),
        ("average", AverageConfig(decay=1.0), r"average\.decay must lie in \[0, 1\), got 1.0"),
        ("schedule", ScheduleConfig("cosine", milestones=(3,)), "milestones must be left out with schedule cosine"),
        ("evaluation", EvaluationConfig(every=0), "evaluation.every must be at least 1, got 0"),
        ("augmentation", AugmentationConfig(noise=-1.0), "augmentation.noise must be at least 0 and finite, got -1.0"),
        ("machine", MachineConfig(accumulation=0), "machine.accumulation must be at least 1, got 0"),
        ("machine", MachineConfig(batch_norm="synchronized"), "machine.batch_norm must be per-process on the CPU"),
    ],
)
def test_each_part_names_what_is_wrong(name, part, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(**{name: part})


def test_config_is_plain_json_and_is_read_back():
    config = RunConfig(
        seed=3,
        method="l2i",
        base_settings={"threshold": 0.9},
        optimizer=OptimizerConfig("adam", betas=(0.5, 0.9)),
        schedule=ScheduleConfig("steps", milestones=(3, 5)),
        split=SplitConfig(validation_per_class=5),
        augmentation=AugmentationConfig(strong="weak", shift=2, flip=False),
    )
    written = json.loads(json.dumps(config.as_dict()))
    assert written["base_settings"] == {**dataclasses.asdict(BASE_RECIPES["fixmatch"]), "threshold": 0.9}
    read = from_dict(written)
    assert json.loads(json.dumps(read.as_dict())) == written
    for part in ("optimizer", "schedule", "split", "augmentation"):
        assert getattr(read, part) == getattr(config, part)


def test_what_is_left_to_the_data_is_filled_in_once(digits):
    config = resolve(RunConfig(), digits)
    assert (config.steps, config.labeled_batch, config.unlabeled_batch, config.labels_per_class) == (1000, 40, 120, 1)
    assert (config.optimizer.learning_rate, config.average.decay, config.views) == (0.2, 0.99, "digits")
    assert config.split == SplitConfig(3, 20, 0.25)
    assert resolve(config, digits) == config


@pytest.mark.parametrize("base", BASES)
def test_settings_of_a_base_are_the_papers_but_for_digits(digits, base):
    """And but for two, whose settings of digits serve all."""
    given = {"weight": 3.0} if base == "fixmatch" else {}
    for data, wanted in (("digits", BASE_RECIPES[base]), ("folder", BASES[base]())):
        config = resolve(RunConfig(data=data, labels_per_class=4, base=base, base_settings=given), digits)
        wanted = BASE_RECIPES[base] if base in ("mean-teacher", "vat") else wanted
        assert config.settings()["base_settings"] == {**dataclasses.asdict(wanted), **given}


def test_every_setting_of_the_split_is_heard(digits):
    split = SplitConfig(validation=100, imbalance=4.0, unlabeled_imbalance=2.0, foreign_classes=2)
    config = resolve(RunConfig(labels_per_class=16, split=split), digits)
    assert (config.split.validation_per_class, config.split.validation) == (0, 100)
    run = build(config, digits)
    assert run.images.classes == tuple("01234567")
    counts = run.images.targets[run.split.labeled].bincount().tolist()
    assert counts == [round(16 * 4 ** (-k / 7)) for k in range(8)]
    assert len(run.split.validation) == 100
    assert int(run.images.targets[torch.cat([run.split.validation, run.split.test])].min()) == 0
    assert run.trainer.model.fc.out_features == 8


def test_rates():
    config = ScheduleConfig("steps", warm_up=4, milestones=(6, 8), factor=0.5)
    assert [rate_at(config, step, 10) for step in range(10)] == [0.25, 0.5, 0.75, 1, 1, 1, 0.5, 0.5, 0.25, 0.25]
    assert rate_at(ScheduleConfig("cosine"), 5, 10) == pytest.approx(0.5)
    assert rate_at(ScheduleConfig("cosine-7/16"), 4, 10) == math.cos(7 / 16 * math.pi * 0.4)
    assert rate_at(ScheduleConfig("constant"), 9, 10) == 1


@pytest.mark.parametrize("settings", [{"weigth": 3.0}, {"weight": "much"}])
def test_a_setting_that_a_method_does_not_have_is_named(settings):
    with pytest.raises(ValueError, match=r"^method_settings must fit the method: .*weig"):
        METHODS["l2i"].build(4, 3, settings)
