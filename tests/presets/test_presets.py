"""Presets: what the papers print, the parts of their data, the list, and the command line."""

import dataclasses
import json

import pytest
import torch

from fastmeta import cli
from fastmeta.models import build_model
from fastmeta.presets import PRESETS, preset
from fastmeta.presets.data import DATA_SETS
from fastmeta.training.config import RunConfig, from_dict


def error(name):
    found = PRESETS[name].error
    assert found is not None
    return found


def gain(name, labels):
    """What the method takes off its baseline's error, in points."""
    arm, dataset = name
    return error(f"{arm}-alone-{dataset}-{labels}") - error(f"{arm}-{dataset}-{labels}")


def test_imagenet_as_the_papers_say():
    meta, l2i, weights = (
        PRESETS[name].config
        for name in ("meta-gradient-imagenet-10pct", "l2i-v2-fm-imagenet-5pct", "weights-fixmatch-imagenet-10pct")
    )
    # 600 passes of the 1,153,167 unlabeled images in batches of 512
    assert meta.labels_per_class == 128
    assert meta.steps == 600 * 2252
    assert meta.schedule.warm_up * 120 == meta.steps
    resnet_50 = PRESETS["meta-gradient-resnet-50-imagenet-10pct"].config
    assert resnet_50 == dataclasses.replace(meta, model="resnet-50")
    # 120 passes of 1,217,167 images in batches of 768, a tenth of the rate every 30
    assert l2i.labels_per_class == 64
    assert l2i.steps == 120 * 1584
    assert [l2i.steps / step for step in l2i.schedule.milestones] == pytest.approx([4, 2, 4 / 3])
    assert l2i.settings()["base_settings"]["threshold"] == 0.7
    assert l2i.settings()["base_settings"]["weight"] == 10.0
    # "our method improves over FixMatch around 3%"
    assert gain(("l2i-v2-fm", "imagenet"), "5pct") == pytest.approx(3.25)
    # 3,000 passes of 128,000 labeled images in batches of 1,024
    assert weights.labels_per_class + weights.split.holdout_per_class == 128
    assert weights.steps == 3000 * 125
    assert weights.settings()["method_settings"]["interval"] == 100


def test_learning_to_impute_v2_as_the_paper_says():
    # "significant improvement over MT baseline [...] up-to 12 points in case of 250 labels in CIFAR-10"
    assert gain(("l2i-v2-mt", "cifar10"), 250) == pytest.approx(11.78)
    # "6% and 3% improvement in case of 500 labels in CIFAR-100"
    assert gain(("l2i-v2-fm", "cifar100"), 500) == pytest.approx(3.35)
    config = PRESETS["l2i-v2-mt-cifar10-250"].config
    assert (config.labeled_batch, config.unlabeled_batch, config.average.decay) == (64, 64, 0.999)
    assert config.evaluation.report == "median-of-last-20"
    assert PRESETS["l2i-v2-mt-cifar10-1000"].note == "Table 8 prints 15.76."
    rate = PRESETS["l2i-v2-fm-cifar100-500"].config.optimizer
    assert (rate.name, rate.learning_rate, rate.momentum, rate.weight_decay) == ("sgd", 0.03, 0.9, 0.001)


def test_presets_are_whole():
    """They survive JSON, and name their data; their nets take their images."""
    seen = set()
    for name, found in PRESETS.items():
        config = found.config
        assert from_dict(json.loads(json.dumps(config.as_dict()))).as_dict() == config.as_dict(), name
        assert found.dataset == config.data
        assert found.error is None or 0 < found.error < 100
        seen.add((config.model, config.image_size, found.dataset))
    for model, size, dataset in seen:
        with torch.device("meta"):
            net = build_model(model, num_classes=DATA_SETS[dataset].classes, channels=3, image_size=size)
            assert net.eval()(torch.zeros(1, 3, size, size)).shape == (1, DATA_SETS[dataset].classes)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match=r"preset must be one of .* \(l2i-v2-mt-cifar10-\d+, .*got 'l2i-v2-mt-cifar'"):
        preset("l2i-v2-mt-cifar")


def test_the_list(capsys):
    assert cli.main(["presets"]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in PRESETS)
    assert cli.main(["presets", "L2I-V2", "cifar-10 ", "2 and 8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Learning to Impute, journal version"
    row = next(line.split() for line in lines if "l2i-v2-mt-cifar10-1000" in line)
    assert row[1:6] == ["Tables", "2", "and", "8", "14.76%"]
    assert "[1] Table 8 prints 15.76." in lines
    assert cli.main(["presets", "nothing"]) == 2
    assert capsys.readouterr().err.startswith("fastmeta: error: no preset has nothing in its name")
    assert cli.main(["presets", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == list(PRESETS)
    row = rows["l2i-v2-mt-cifar10-250"]
    assert row["error"] == 25.97
    assert from_dict(row["config"]).as_dict() == PRESETS["l2i-v2-mt-cifar10-250"].config.as_dict()


def test_the_command_line_starts_from_a_preset(monkeypatch, capsys):
    seen: list[RunConfig] = []
    monkeypatch.setattr(cli, "train_command", lambda run, out: seen.append(run) or 0)
    found = {"step": 2, "skipped_steps": 0}
    monkeypatch.setattr(cli, "run_smoke", lambda preset, out: seen.append(preset.config) or found)
    name = "l2i-v2-fm-imagenet-5pct"
    changes = ["--data", "images", "--seed", "7", "--optimizer.learning-rate", "0.2"]
    assert cli.main(["train", "--preset", name, *changes]) == 0
    expected = preset(name).config
    changed = dataclasses.replace(expected.optimizer, learning_rate=0.2)
    assert seen.pop() == dataclasses.replace(expected, data="images", seed=7, optimizer=changed)
    assert cli.main(["train", "--preset", name, "--smoke"]) == 0
    assert seen.pop() == expected
    assert capsys.readouterr().out == f"{name}: 2 steps, 0 of them without a finite loss\n"
    found["skipped_steps"] = 1
    assert cli.main(["train", "--preset", name, "--smoke"]) == 1


def test_what_the_command_line_refuses(capsys):
    for arguments, message in {
        ("train", "--smoke"): "--preset must be given with smoke: see fastmeta presets",
        ("train", "--preset", "l2i"): "--preset must be one of those that fastmeta presets lists",
        ("train", "--preset", "l2i-v2-mt-cifar10-250"): "--data must be where cifar-10 is for preset l2i-v2-mt-cifar10",
    }.items():
        assert cli.main(list(arguments)) == 2
        assert f"fastmeta: error: {message}" in capsys.readouterr().err
