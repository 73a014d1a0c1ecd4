"""Presets: what the papers print, and a few steps of each on generated images in both layouts."""

import dataclasses
import json

import pytest
import torch

from fastmeta import cli
from fastmeta.models import build_model
from fastmeta.presets import PRESETS, preset, smoke
from fastmeta.training.config import RunConfig, from_dict


def test_the_papers_numbers():
    meta, l2i, weights = (
        PRESETS[f"imagenet-{name}"] for name in ("10pct-meta-gradient", "5pct-fixmatch-l2i", "10pct-fixmatch-weights")
    )
    # 600 passes of the 1,153,167 unlabeled images in batches of 512
    assert meta.labels_per_class == 128
    assert meta.steps == 600 * 2252
    assert meta.schedule.warm_up * 120 == meta.steps
    assert PRESETS["imagenet-10pct-meta-gradient-resnet-50"] == dataclasses.replace(meta, model="resnet-50")
    # 120 passes of 1,217,167 images in batches of 768, a tenth of the rate every 30
    assert l2i.labels_per_class == 64
    assert l2i.steps == 120 * 1584
    assert [l2i.steps / step for step in l2i.schedule.milestones] == pytest.approx([4, 2, 4 / 3])
    assert l2i.settings()["base_settings"] == {"threshold": 0.7, "weight": 10.0}
    # 3,000 passes of 128,000 labeled images in batches of 1,024
    assert weights.labels_per_class + weights.split.holdout_per_class == 128
    assert weights.steps == 3000 * 125
    assert weights.settings()["method_settings"]["interval"] == 100


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_whole(name):
    """They survive JSON, and their net takes their images."""
    config = preset(name)
    assert from_dict(json.loads(json.dumps(config.as_dict()))).as_dict() == config.as_dict()
    with torch.device("meta"):
        model = build_model(config.model, num_classes=1000, channels=3, image_size=config.image_size)
        assert model.eval()(torch.zeros(1, 3, config.image_size, config.image_size)).shape == (1, 1000)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match=r"preset must be one of imagenet-10pct-meta-gradient, .* got 'imagenet'"):
        preset("imagenet")


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.endswith("resnet-50")])
def test_smoke(name, tmp_path):
    """On a smaller net and smaller images than the preset's own."""
    config = dataclasses.replace(preset(name), model="conv-net", image_size=24)
    layouts = ["folder", "parquet"] if smoke._has_pyarrow() else ["folder"]
    results = smoke.run_smoke(config, tmp_path)
    assert list(results) == layouts
    for layout in layouts:
        rows = [json.loads(line) for line in (tmp_path / layout / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [2, 4]
        assert all(row["skipped_steps"] == 0 for row in rows)
        assert results[layout]["split"]["labeled"] == 40
        assert results[layout]["split"]["validation"] == 40


def test_both_layouts_hold_the_same_images(tmp_path):
    pytest.importorskip("pyarrow")
    from fastmeta.data import open_images

    smoke.write_folder(tmp_path / "folder", 24)
    smoke.write_parquet(tmp_path / "parquet", 24)
    folder, parquet = (open_images(str(tmp_path / name), image_size=24) for name in ("folder", "parquet"))
    assert folder.classes == parquet.classes
    for part in ("train", "validation"):
        found = []
        for images in (folder, parquet):
            places = images.parts[part]
            sums = images.get(places).flatten(1).sum(1).tolist()
            found.append(sorted(zip(images.targets[places].tolist(), sums, strict=True)))
        assert found[0] == found[1]


def test_the_command_line_starts_from_a_preset(monkeypatch, capsys):
    seen: list[RunConfig] = []
    monkeypatch.setattr(cli, "train_command", lambda run, out: seen.append(run) or 0)
    found = {"step": 4, "skipped_steps": 0, "validation_error": 0.95, "validation_top5_error": 0.7}
    monkeypatch.setattr(cli, "run_smoke", lambda run, out: seen.append(run) or {"folder": found})
    name = "imagenet-5pct-fixmatch-l2i"
    assert (
        cli.main(["train", "--preset", name, "--data", "images", "--seed", "7", "--optimizer.learning-rate", "0.2"])
        == 0
    )
    expected = preset(name)
    changed = dataclasses.replace(expected.optimizer, learning_rate=0.2)
    assert seen.pop() == dataclasses.replace(expected, data="images", seed=7, optimizer=changed)
    assert cli.main(["train", "--preset", name, "--smoke"]) == 0
    assert seen.pop() == expected
    assert "l2i, folder: 4 steps, 0 of them without a finite loss; top-1 and top-5 error 95% and 70%" in (
        capsys.readouterr().out
    )
    found["skipped_steps"] = 1
    assert cli.main(["train", "--preset", name, "--smoke"]) == 1
    assert cli.main(["train", "--smoke"]) == 2
    assert "--preset must be one of" in capsys.readouterr().err
