"""The whitening of a run: from the images that training reads, the same on all processes, kept for all that follows."""

import csv
import dataclasses
import importlib
import math
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from short_runs import assert_same_run, small

from fastmeta.data import ImageDataset, Images, Split
from fastmeta.data.augment import Whitening
from fastmeta.models import Normalized
from fastmeta.ops.process_group import Group
from fastmeta.training import AugmentationConfig, RunConfig, build, train
from fastmeta.training.predict import load_model, predict
from fastmeta.training.processes import Processes
from fastmeta.training.reports.run_folder import read_run
from fastmeta.training.whitening import agreed_whitening, read_whitening

AUGMENTATION = AugmentationConfig(whitening="zca", strong="weak", noise=0.1)


def config(**settings: Any) -> RunConfig:
    return RunConfig(**{"augmentation": AUGMENTATION, "base": "mean-teacher", **small(), **settings})


def agreed(images: Images, split: Split, group: Group = None, known: Whitening | None = None) -> Whitening:
    return agreed_whitening(known, images, split, 8, workers=0, device="cpu", processes=Processes(group))


def whitening_on(group: Group, images: Images) -> list[torch.Tensor]:
    split = build(config(), images).split
    made = agreed(images, split, group)
    mine = made if group is None or group.rank() == 0 else None  # not all have it
    few = agreed(images, dataclasses.replace(split, unlabeled=split.unlabeled[:20]), group)  # of 64 numbers each
    return [made.mean, made.matrix, agreed(images, split, group, mine).matrix, few.matrix]


def test_processes_have_the_same(digits: Images) -> None:
    alone = whitening_on(None, digits)
    first, second = forked.run(whitening_on, 2, digits)
    for mine, one, other in zip(alone, first, second, strict=True):
        assert one.equal(other)
        torch.testing.assert_close(one, mine, atol=1e-5, rtol=1e-5)


def test_only_what_training_reads_decides(digits: Images) -> None:
    split = build(config(), digits).split
    changed = digits.images.clone()
    changed[torch.cat([split.validation, split.test])] = 0.5
    other = ImageDataset("digits", changed, digits.targets, 10)
    made = [agreed(images, split) for images in (digits, other)]
    assert made[0].matrix.equal(made[1].matrix)
    white = made[0](digits.images[split.unlabeled]).flatten(1)
    assert white.mean(dim=0).abs().max() < 0.02


def test_a_run_keeps_it(tmp_path: Path, digits: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resume and a prediction read the file: they do not compute it."""
    monkeypatch.setattr(importlib.import_module("fastmeta.training.train"), "write_report", lambda *_: None)
    train(config(), tmp_path / "whole", images=digits)
    seen: list[int] = []
    train(config(), tmp_path / "same", images=digits, on_step=seen.append, should_stop=lambda: len(seen) > 5)
    kept = read_whitening(tmp_path / "same")
    assert kept is not None
    monkeypatch.setattr("fastmeta.training.whitening.contrast_normalized", lambda *_: math.nan)
    train(config(), tmp_path / "same", images=digits)
    assert_same_run(tmp_path / "whole", tmp_path / "same")

    run = read_run(tmp_path / "same")
    predictions = predict(run, digits, tmp_path / "predictions.csv", workers=0)
    with (tmp_path / "predictions.csv").open() as file:
        labels = [row["label"] for row in csv.DictReader(file)]
    built = build(config(), digits, whitening=kept)
    wrong = sum(labels[place] != str(int(digits.targets[place])) for place in built.split.test.tolist())
    assert predictions.images == len(digits)
    assert run.results is not None
    assert wrong == round(run.results["test_error"] * len(built.split.test))
    with torch.no_grad():
        of_pixels = load_model(run).eval()(digits.images).argmax(dim=1)
    assert [str(label) for label in of_pixels.tolist()] != labels

    (tmp_path / "same" / "whitening.pt").unlink()
    with pytest.raises(ValueError, match=r"same: whitening.pt is not there"):
        predict(run, digits, tmp_path / "again.csv")


def test_a_net_does_not_normalize_what_is_normalized(digits: Images) -> None:
    for augmentation, expected in ((AugmentationConfig(), (0.5, 0.5)), (AUGMENTATION, (0.0, 1.0))):
        made = build(config(model="wide-resnet-28-2", augmentation=augmentation), digits)
        for model in (made.trainer.model, made.trainer.average.model):
            assert isinstance(model, Normalized)
            assert (float(model.mean), float(model.std)) == expected


def test_images_whose_matrix_is_too_large(digits: Images) -> None:
    large = ImageDataset("large", torch.zeros(1797, 1, 91, 91), digits.targets, 10)
    settings = dataclasses.replace(AUGMENTATION, shift=2)
    with pytest.raises(ValueError, match="none for images of more than 8192 numbers, got 1 x 91 x 91 = 8281"):
        build(config(augmentation=settings, model="linear"), large)
