import csv
import json
import shutil
from dataclasses import replace

import pytest
import torch
from picture_runs import CLASSES, train_on, write_pictures
from PIL import Image

from fastmeta import cli
from fastmeta.data import ImageDataset, open_images
from fastmeta.models import build_model
from fastmeta.training import predict as module
from fastmeta.training.data_to_predict import open_for_prediction
from fastmeta.training.predict import predict, summary_of
from fastmeta.training.reports.run_folder import read_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("predict")


@pytest.fixture(scope="module")
def pictures(folder):
    return write_pictures(folder / "data")


@pytest.fixture(scope="module")
def run(folder, pictures):
    return train_on(pictures, folder / "run")


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_it_predicts_what_the_evaluation_of_training_did(tmp_path, pictures, run):
    out = tmp_path / "predictions.csv"
    finished = read_run(run)
    found = predict(finished, open_for_prediction([str(pictures / "test")], finished), out)
    counts = finished.results["confusion"]["counts"]
    assert found.counts.tolist() == counts
    assert len({*(column for row in counts for column, count in enumerate(row) if count)}) > 1
    errors = sum(sum(row) for row in counts) - sum(row[place] for place, row in enumerate(counts))
    assert [(part.part, part.images, part.errors) for part in found.parts] == [("all", 24, errors)]
    assert errors / 24 == finished.results["test_error"]
    rows = rows_of(out)
    assert list(rows[0]) == ["path", "label", "confidence"]
    assert {row["label"] for row in rows} <= set(CLASSES)
    assert all(0.25 < float(row["confidence"]) < 1 for row in rows)


def test_a_run_of_the_last_layer_alone_predicts_with_its_whole_net(tmp_path, pictures):
    weights = tmp_path / "weights.pt"
    net = build_model("conv-net", num_classes=10, channels=1, image_size=8)
    torch.save(net.state_dict(), weights)
    run = train_on(pictures, tmp_path / "run", model="conv-net", pretrained=str(weights), trainable="head")
    finished = read_run(run)
    found = predict(finished, open_for_prediction([str(pictures / "test")], finished), tmp_path / "out.csv")
    assert found.counts.tolist() == finished.results["confusion"]["counts"]


def test_unlabeled_images_of_the_run_have_their_weight_and_their_change(tmp_path, pictures, run, monkeypatch):
    finished = read_run(run)
    monkeypatch.chdir(pictures.parent)  # the same files by another name
    found = predict(finished, open_for_prediction(["data"], finished), tmp_path / "out.csv")
    assert (found.images, found.known, len(found.unreadable)) == (85, 41, 1)
    assert [(part.part, part.images) for part in found.parts] == [("test", 24), ("train", 20), ("unlabeled", 40)]
    of_run = {row["path"]: row for row in finished.unlabeled()}
    rows = {row["path"]: row for row in rows_of(tmp_path / "out.csv")}
    assert len(of_run) == 41
    assert len({row["weight"] for row in of_run.values()}) > 2
    for path, row in of_run.items():
        assert rows[path]["label"] == row["label"]
        if row["confidence"]:
            assert float(rows[path]["confidence"]) == pytest.approx(float(row["confidence"]), abs=6e-5)
        for name in ("weight", "label_before", "label_after", "label_change"):
            assert rows[path][name] == row[name]
    assert all(row["weight"] == "" for path, row in rows.items() if path not in of_run)


def test_workers_and_batches_change_nothing(tmp_path, pictures, run):
    finished = read_run(run)
    images = open_for_prediction([str(pictures)], finished)
    predict(finished, images, tmp_path / "a.csv", workers=0)
    predict(finished, images, tmp_path / "b.csv", workers=2, batch_size=7)
    first, second = (rows_of(tmp_path / name) for name in ("a.csv", "b.csv"))
    for row, other in zip(first, second, strict=True):  # products of other sizes round differently
        assert {**row, "confidence": ""} == {**other, "confidence": ""}
        assert row["confidence"] == other["confidence"] or float(row["confidence"]) == pytest.approx(
            float(other["confidence"]), abs=2e-6
        )


def test_labels_are_compared_by_the_names_of_their_classes(tmp_path, pictures, run):
    """Another order, a class that the run does not know, and images without a label."""
    finished = read_run(run)
    whole = open_images(str(pictures), image_size=8, mode="L", cache=False)
    test = whole.parts["test"]
    order = [2, 0, 3, 1]
    classes = (*(finished.classes[place] for place in order), "six")
    targets = torch.tensor([order.index(int(target)) for target in whole.targets[test]])
    targets[:2] = 4
    targets[2] = -1
    images = ImageDataset("other", whole.get(test), targets, classes)
    found = predict(finished, images, tmp_path / "out.csv")
    assert found.foreign == {"six": 2}
    assert found.parts[0].images == 21
    predicted = [row["label"] for row in rows_of(tmp_path / "out.csv")]
    expected = torch.zeros(4, 4, dtype=torch.int64)
    for place in range(3, 24):
        expected[int(whole.targets[test][place]), finished.classes.index(predicted[place])] += 1
    assert found.counts.equal(expected)
    assert "labels that are no class of the run: six (2)" in summary_of(found, finished)


def test_the_command_with_a_flat_folder_and_a_broken_file(tmp_path, pictures, run, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in sorted((pictures / "test").rglob("*.png"))[:3]:
        shutil.copy(path, flat / path.name)
    (flat / ".hidden.png").write_bytes(b"")
    (flat / "notes.txt").write_text("no picture")
    broken = flat / "broken.png"
    broken.write_bytes(b"no picture")
    out = tmp_path / "new" / "predictions.csv"
    assert cli.main(["predict", str(run), str(flat), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"4 images\n{out}\n"
    assert printed.err.count("\n") == 1
    assert f"1 of 4 images could not be read and have no label: {broken} (" in printed.err
    rows = rows_of(out)
    assert [bool(row["label"]) for row in rows] == [row["path"] != str(broken) for row in rows]
    assert len(rows) == 4
    assert [bool(row["confidence"]) for row in rows] == [bool(row["label"]) for row in rows]
    # Single files; and nothing but broken ones.
    assert cli.main(["predict", str(run), rows[0]["path"], rows[1]["path"], "--out", str(out)]) == 0
    assert len(rows_of(out)) == 2
    assert cli.main(["predict", str(run), str(broken), "--out", str(out)]) == 1
    assert rows_of(out) == [{"path": str(broken), "label": "", "confidence": ""}]


def test_the_summary_has_the_error_and_the_confusion(tmp_path, pictures, run, capsys):
    assert cli.main(["predict", str(run), str(pictures / "test"), "--out", str(tmp_path / "out.csv")]) == 0
    printed = capsys.readouterr().out.splitlines()
    finished = read_run(run)
    assert printed[0] == "24 images"
    assert printed[1].startswith(f"all: error {100 * finished.results['test_error']:.2f}% (")
    for line, name, counts in zip(printed[4:], finished.classes, finished.results["confusion"]["counts"], strict=False):
        assert name in line
        assert line.split()[-4:] == [str(count or ".") for count in counts]


def test_many_classes_have_their_most_confused_pairs(run):
    counts = torch.eye(30, dtype=torch.int64) * 5
    counts[3, 7], counts[8, 2] = 2, 4
    found = module.Predictions(156, {}, 0, (module.PartError("test", 156, 6),), counts, {})
    config = {"record": {"classes": [f"class {place}" for place in range(30)], "image_shape": [3, 8, 8]}}
    lines = summary_of(found, replace(read_run(run), config=config)).splitlines()
    assert lines[-3:] == [
        "most confused: label, predicted as, images",
        "  class 8, class 2, 4",
        "  class 3, class 7, 2",
    ]


def test_what_cannot_be_predicted_is_one_line(tmp_path, pictures, run, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "colours").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "colours" / "a.png")
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished)
    (unfinished / "results.json").unlink()
    out = tmp_path / "out.csv"
    for arguments, words in (
        ([tmp_path / "empty", pictures], [f"{tmp_path / 'empty'}: no run of fastmeta train"]),
        (
            [unfinished, pictures],
            ["not finished (step 20 of 20)", f"continues it: fastmeta train --data {pictures}", f"--out {unfinished}"],
        ),
        ([run, tmp_path / "colours"], ["pictures have colours, expected gray ones"]),
        ([run, tmp_path / "nowhere"], [f"{tmp_path / 'nowhere'}: no such file or folder"]),
        ([run], ["no images found"]),
        ([run, pictures, "--out", tmp_path], ["--out must be a file, got the folder"]),
        ([run, pictures, "--workers", -1], ["--workers must be at least 0, got -1"]),
        ([run, pictures, "--device", "cuda"], ["--device must be cpu where torch sees no GPU, got 'cuda'"]),
        ([run, pictures, "--batch-size", 0], ["--batch-size must be at least 1, got 0"]),
    ):
        assert cli.main(["predict", *map(str, arguments), *([] if "--out" in arguments else ["--out", str(out)])]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert error.startswith("fastmeta: error: ")
        for word in words:
            assert word in error
    assert not out.exists()
    with pytest.raises(ValueError, match="images have 3 channels of 8 x 8 pixels, expected 1 channel of 8 x 8 pixels"):
        predict(read_run(run), ImageDataset("rgb", torch.zeros(2, 3, 8, 8), torch.zeros(2).long(), 2), out)


def test_a_csv_is_whole_or_as_it_was(tmp_path, pictures, run, monkeypatch):
    finished = read_run(run)
    images = open_for_prediction([str(pictures)], finished)
    out = tmp_path / "out.csv"
    out.write_text("before")
    reading = module.read_in_order

    def breaks(*arguments, **options):
        yield next(iter(reading(*arguments, **options)))
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "read_in_order", breaks)
    with pytest.raises(KeyboardInterrupt):
        predict(finished, images, out, batch_size=4)
    assert out.read_text() == "before"
    assert list(tmp_path.iterdir()) == [out]


def test_a_run_whose_config_is_no_json_is_named(tmp_path, run):
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    text = (damaged / "config.json").read_text()
    (damaged / "config.json").write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        read_run(damaged)
    (damaged / "config.json").write_text(json.dumps({"runs": []}))  # that of a comparison
    with pytest.raises(ValueError, match="no run of fastmeta train"):
        read_run(damaged)
