"""Landmarks: AFLW's lists, views that move what is looked for, the base against its definition, and that it learns."""

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fastmeta.data import DataError, Plain, Shift, Split, Views, make_split, open_images
from fastmeta.data.generated import WRITERS
from fastmeta.data.landmarks import COORDINATES, Landmarks
from fastmeta.ssl import MeanTeacher, TrainingBatch, TranslationConsistency
from fastmeta.training import RunConfig, TrainingData, build
from fastmeta.training.batches import Batches
from fastmeta.training.build import load_images
from fastmeta.training.config import AugmentationConfig, EvaluationConfig, MachineConfig
from fastmeta.training.data_to_predict import open_for_prediction
from fastmeta.training.predict_landmarks import predict_landmarks
from fastmeta.training.processes import Processes
from fastmeta.training.reports.report import write_report
from fastmeta.training.reports.run_folder import read_run
from fastmeta.training.train import train


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aflw")
    WRITERS["aflw"](folder)
    return folder


def dots(count: int, size: int = 20) -> Landmarks:
    """The first landmark is the only bright pixel of its image, 5 or more pixels from the border."""
    coordinates = torch.rand(count, 10) * size
    coordinates[:, [0, 5]] = torch.randint(5, size - 5, (count, 2)).float()
    images = torch.zeros(count, 1, size, size, dtype=torch.uint8)
    for image, row in zip(images, coordinates.long(), strict=True):
        image[0, row[5], row[0]] = 255
    return Landmarks("dots", images, coordinates, {"train": torch.arange(count)}, [str(k) for k in range(count)])


def test_lists_are_read_as_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "lfw_5590").mkdir()
    pixels = np.random.default_rng().integers(0, 256, (60, 120), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "lfw_5590" / "a.png")
    line = "lfw_5590\\a.png 40 80 60 44 76 20 22 30 40 41 1 2 2 3\n"
    (tmp_path / "training.txt").write_text(f" {line}\n")
    (tmp_path / "testing.txt").write_text(line)
    images = open_images(f"aflw:{tmp_path}", image_size=60)
    assert isinstance(images, Landmarks)
    assert images.coordinates[0].tolist() == [20, 40, 30, 22, 38, 20, 22, 30, 40, 41]  # twice as wide as high
    assert {part: places.tolist() for part, places in images.parts.items()} == {"train": [0], "test": [1]}
    expected = pixels.reshape(60, 60, 2).mean(axis=2)  # a triangle over two pixels and their neighbours
    assert abs(images.get(torch.tensor([0]))[0, 0].float().numpy() - expected).mean() < 40
    (tmp_path / "testing.txt").write_text("lfw_5590\\a.png 40 80 60\n")
    with pytest.raises(DataError, match=r"testing.txt: line 1: must have 10 finite coordinates, got 3"):
        open_images(tmp_path)
    (tmp_path / "testing.txt").write_text(line.replace("a.png", "b.png"))
    with pytest.raises(DataError, match=r"b.png: cannot be read"):
        open_images(tmp_path)
    deep = Image.fromarray((pixels.astype(np.uint16) * 257).astype(np.uint16))
    deep.save(tmp_path / "lfw_5590" / "b.png")
    both = open_images(tmp_path, image_size=60)
    assert both.get(torch.tensor([0])).equal(both.get(torch.tensor([1]))), "16 bits are scaled to 8"
    (tmp_path / "testing.txt").write_text(f"\ufeff{line}\n\nlfw_5590\\a.png 1 2\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"testing.txt: line 4: must have 10 finite coordinates"):
        open_images(tmp_path)
    (tmp_path / "testing.txt").write_bytes(line.encode() + b"caf\xe9.png 1 2\n")
    with pytest.raises(DataError, match=r"testing.txt: must be UTF-8 text"):
        open_images(tmp_path)
    (tmp_path / "testing.txt").unlink()
    with pytest.raises(DataError, match=r"aflw without testing.txt; get MTFL.zip"):
        open_images(f"aflw:{tmp_path}")


def test_error_is_the_distance_over_that_of_the_eyes() -> None:
    true = torch.tensor([[10.0, 40, 25, 15, 35, 20, 20, 30, 45, 45]])
    images = Landmarks("one", torch.zeros(2, 1, 60, 60, dtype=torch.uint8), true.repeat(2, 1), {}, ["a", "b"])
    found = true + torch.tensor([[3.0, 0, 0, 0, 0, 4, 0, 0, 0, 12]])  # 5 pixels off, and 12
    assert images.errors(found, true).item() == pytest.approx((5 + 12) / 5 / 30)
    other = dots(50).standardized(torch.arange(20))
    assert other.targets[:20].mean(0).abs().max() < 1e-5
    assert torch.allclose(other.targets[:20].std(0, correction=0), torch.ones(10), atol=1e-4)
    assert torch.allclose(other.pixels(other.targets), other.coordinates, atol=1e-4)
    with pytest.raises(ValueError, match="two eyes in two places, got one of a"):
        Landmarks("one", images.images, torch.ones(2, 10), {}, ["a", "b"])


@pytest.mark.parametrize("holdout", ["batch", "labeled"])
def test_targets_move_with_the_views(holdout: str) -> None:
    images = dots(40).standardized(torch.arange(10))
    none = torch.arange(0)
    split = Split(torch.arange(10), torch.arange(10, 40), none, none, none)
    shift = Shift(20, 4, "reflected")
    data = TrainingData(images, split, Views(shift, shift, Plain(20)), labeled_batch=16, unlabeled_batch=16)
    batches = Batches(data, second_view="weak", holdout=holdout, seed=3, machine=MachineConfig(), processes=Processes())
    batch = batches(0)
    assert batch.second is not None
    assert batch.moved is not None

    def brightest(view: torch.Tensor) -> torch.Tensor:
        place = view.flatten(1).argmax(dim=1)
        return torch.stack([place % 20, place // 20], dim=1).double()

    assert torch.allclose(images.pixels(batch.targets)[:, [0, 5]], brightest(batch.labeled), atol=1e-3)
    moved = (batch.moved.double() * images.deviation)[:, [0, 5]]
    assert torch.allclose(moved, brightest(batch.second) - brightest(batch.weak), atol=1e-3)
    assert moved.abs().max() > 0
    if holdout == "labeled":
        assert batch.holdout is not None
        assert batch.holdout_targets is not None
        assert torch.allclose(images.pixels(batch.holdout_targets)[:, [0, 5]], brightest(batch.holdout), atol=1e-3)


@pytest.mark.parametrize("imputer", ["teacher", "student"])
def test_base_is_its_definition(imputer: str) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()
    teacher = copy.deepcopy(net)
    teacher[1].weight.data += 1.0
    x_l, x, other, y = (torch.randn(*size, dtype=torch.float64) for size in ((2, 4), (5, 4), (5, 4), (2, 3)))
    moved = torch.randn(5, 3, dtype=torch.float64)
    batch = TrainingBatch(x_l, y, x, other, torch.arange(5), moved=moved)
    base = TranslationConsistency(weight=7.0, imputer=imputer)  # type: ignore[arg-type]
    loss = base.loss(net, batch, teacher=teacher, progress=0.1)
    guesses = (teacher if imputer == "teacher" else net)(x).detach() + moved
    expected = (net(x_l) - y).square().sum() / 6 + 7.0 * 0.25 * (net(other) - guesses).square().sum() / 15
    assert torch.allclose(loss.total, expected)
    gradient, wanted = (torch.autograd.grad(value, net[1].weight)[0] for value in (loss.total, expected))
    assert torch.allclose(gradient, wanted)
    with pytest.raises(ValueError, match="must not be translation-consistency without landmarks"):
        base.loss(net, dataclasses.replace(batch, moved=None), teacher=teacher, progress=0.0)


def test_faces_are_learned(faces: Path, tmp_path: Path) -> None:
    config = RunConfig(
        data=str(faces),
        base="translation-consistency",
        method="l2i",
        labels_per_class=24,
        steps=24,
        labeled_batch=16,
        unlabeled_batch=16,
        evaluation=EvaluationConfig(every=24),
        machine=MachineConfig(threads=1),
    )
    images = load_images(config)
    assert isinstance(images, Landmarks)
    labeled = make_split(images, labels_per_class=24, seed=0).labeled
    test = images.coordinates[images.parts["test"]]
    blind = float(images.errors(images.coordinates[labeled].mean(0).expand_as(test), test).mean())
    error = train(config, tmp_path / "run")["test_error"]
    assert error < 0.9 * blind, "no better than the mean of the labeled faces"
    lines = (tmp_path / "run" / "landmarks.csv").read_text().splitlines()
    assert lines[0] == ",".join(["path", *COORDINATES])
    assert len(lines) == 1 + 160 - 24
    _predict_as_the_run(tmp_path / "run", faces, error, lines)


def _predict_as_the_run(folder: Path, faces: Path, error: float, of_run: list[str]) -> None:
    run = read_run(folder)
    out = folder / "predictions.csv"
    errors = predict_landmarks(run, open_for_prediction([str(faces)], run), out)
    assert list(errors) == ["train", "test"]
    assert errors["test"] == pytest.approx(error, abs=1e-6)
    assert len(out.read_text().splitlines()) == 241
    # The last weights of the run and its averaged ones may differ, and so the places; the pictures are the same.
    assert {line.split(",")[0] for line in of_run[1:]} < {line.split(",")[0] for line in out.read_text().splitlines()}
    listed = (faces / "testing.txt").read_text().splitlines()[0].split()
    picture, true = faces / listed[0].replace("\\", "/"), [float(value) for value in listed[1:11]]
    assert predict_landmarks(run, open_for_prediction([str(picture)], run), out) == {}, "its landmarks are not known"
    (line,) = out.read_text().splitlines()[1:]
    found = [float(value) for value in line.removeprefix(f"{picture},").split(",")]
    # In pixels of the picture, 150 wide, and not of the 60 that the net sees.
    assert max(abs(one - other) for one, other in zip(found, true, strict=True)) < 60
    assert max(found) > 75
    assert len(open_for_prediction([f"{faces / 'AFLW'}/"], run)) == 80
    larger = folder / "larger.png"
    with Image.open(picture) as image:
        image.resize((600, 300)).save(larger)
    predict_landmarks(run, open_for_prediction([str(larger)], run), out)
    (line,) = out.read_text().splitlines()[1:]
    scaled = [float(value) for value in line.removeprefix(f"{larger},").split(",")]
    assert max(abs(x - 4 * old) for x, old in zip(scaled[:5], found[:5], strict=True)) < 30
    assert max(abs(y - 2 * old) for y, old in zip(scaled[5:], found[5:], strict=True)) < 15
    write_report([folder], folder / "report.html")
    page = (folder / "report.html").read_text()
    assert f"{100 * error:.2f}%" in page
    assert "95%:" not in page, "a mean distance is no share of the images"
    old_run = dataclasses.replace(run, results={"test_error": 0.1})
    with pytest.raises(ValueError, match=r"results.json must have standardized_by"):
        predict_landmarks(old_run, open_for_prediction([str(picture)], run), out)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base": "mean-teacher"}, "base must be one of translation-consistency for images with landmarks"),
        ({"method": "meta-gradient"}, "method must be none or one of l2i, .* got 'meta-gradient'"),
        ({"augmentation": AugmentationConfig(flip=True)}, "augmentation.flip must be left out for images with"),
    ],
)
def test_what_landmarks_cannot_have_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(RunConfig(**{"base": "translation-consistency", "labels_per_class": 4, **settings}), dots(40))


def test_classes_have_no_landmarks() -> None:
    with pytest.raises(ValueError, match=r"base must be one of supervised, .* for images with classes"):
        load_images(RunConfig(base="translation-consistency"))
    assert MeanTeacher.task == "classification"
