"""Every preset takes two steps on generated images in its data set's format."""

import dataclasses
import json

import pytest
import torch

from fastmeta.data.generated import WRITERS
from fastmeta.presets import PRESETS
from fastmeta.presets.smoke import run_smoke, small
from fastmeta.training.build import build, load_images

NET, SIDE = "conv-net", 16


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_preset_takes_two_steps(tmp_path):
    """On a smaller net and smaller images than its own; presets that are the same then take them once."""
    images, taken = {}, set()
    for name, cell in PRESETS.items():
        if cell.dataset == "imdb":
            continue
        folder = tmp_path / cell.dataset
        if cell.dataset not in images:
            WRITERS[cell.dataset](folder)
        run = dataclasses.replace(small(cell.config, f"{cell.dataset}:{folder}"), model=NET, image_size=SIDE)
        if "layers" in run.method_settings:  # of its own net
            settings = {**run.method_settings, "layers": ["fc"]}
            run = dataclasses.replace(run, method_settings=settings)
        if cell.dataset not in images:
            images[cell.dataset] = load_images(run)
        described = json.dumps(run.as_dict(), sort_keys=True)
        if described in taken:
            continue
        taken.add(described)
        trainer = build(run, images[cell.dataset]).trainer
        for _ in range(run.steps):
            trainer.train_step()
        trainer.batches.close()
        assert trainer.skipped.tolist() == [0, 0], name
    assert len(taken) > 100


@pytest.mark.parametrize("name", [name for name, cell in PRESETS.items() if cell.dataset == "imdb"])
def test_presets_of_texts_take_two_steps(name, tmp_path):
    pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    WRITERS["imdb"](tmp_path)
    run = dataclasses.replace(small(PRESETS[name].config, f"imdb:{tmp_path}"), model="bert-tiny", image_size=16)
    trainer = build(run, load_images(run)).trainer
    for _ in range(run.steps):
        trainer.train_step()
    assert trainer.skipped.tolist() == [0, 0]


def test_a_whole_run(tmp_path):
    """With the preset's own net and image size: what ``fastmeta train --preset NAME --smoke`` does."""
    results = run_smoke(PRESETS["l2i-v2-fm-cifar10-250"], tmp_path)
    assert results["skipped_steps"] == 0
    assert results["split"] == {"labeled": 10, "unlabeled": 80, "holdout": 0, "validation": 10, "test": 20}
    (row,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (row["step"], row["method"]) == (2, "l2i-published")
