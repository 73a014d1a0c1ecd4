import dataclasses
import math
import multiprocessing
import os

import pytest
import torch
from short_runs import assert_same_run, small, tensors

from fastmeta.data import ImageDataset
from fastmeta.training import ConfigMismatch, RunConfig, build, train
from fastmeta.training.files import alone, read_jsonl
from fastmeta.training.recipes import METHODS


class Killed(BaseException):
    """Stands for a kill: nothing is saved when it happens."""


@pytest.mark.parametrize(
    ("base", "method"),
    [
        ("supervised", "none"),
        ("pseudo-label", "none"),
        ("mean-teacher", "l2i"),
        ("vat", "none"),
        ("vat", "label-gradient-alignment"),
        *(("fixmatch", name) for name in METHODS),
    ],
)
def test_resume_after_a_kill_is_bit_exact(tmp_path, digits, base, method):
    config = RunConfig(base=base, method=method, seed=1, **small())
    train(config, tmp_path / "whole", images=digits)

    def kill(step):
        if step == 7:  # after the checkpoint at 4 and the evaluation at 6
            raise Killed

    with pytest.raises(Killed):
        train(config, tmp_path / "killed", images=digits, on_step=kill)
    assert [row["step"] for row in read_jsonl(tmp_path / "killed" / "metrics.jsonl")] == [3, 6]
    steps = []
    train(config, tmp_path / "killed", images=digits, on_step=steps.append)
    assert steps == [4, 5, 6, 7, 8, 9]
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_stopping_checkpoints_at_the_step_reached(tmp_path, digits):
    config = RunConfig(**small())
    train(config, tmp_path / "whole", images=digits)
    seen = []
    stopped = train(config, tmp_path / "stopped", images=digits, on_step=seen.append, should_stop=lambda: len(seen) > 5)
    assert stopped is None
    resumed = []
    train(config, tmp_path / "stopped", images=digits, on_step=resumed.append)
    assert resumed[0] == seen[-1] == 5
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_training_leaves_the_callers_random_state_and_threads_alone(tmp_path, digits):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    train(RunConfig(**small()), tmp_path, images=digits)
    assert torch.get_rng_state().equal(state)
    assert torch.get_num_threads() == threads


def test_a_finished_run_is_only_read(tmp_path, digits):
    config = RunConfig(**small())
    first = train(config, tmp_path, images=digits)
    written = (tmp_path / "model.pt").stat().st_mtime_ns
    assert train(config, tmp_path, images=digits) == first
    assert (tmp_path / "model.pt").stat().st_mtime_ns == written


def _trained_alone(folder):
    """Whether another process may train there."""

    def enter():
        try:
            with alone(folder):
                os._exit(0)
        except ValueError:
            os._exit(1)

    process = multiprocessing.get_context("fork").Process(target=enter)
    process.start()
    process.join()
    return process.exitcode == 0


def test_two_processes_do_not_train_one_run(tmp_path):
    with alone(tmp_path):
        assert not _trained_alone(tmp_path)
    assert _trained_alone(tmp_path)
    with alone(tmp_path):  # what the child left is no lock
        pass
    assert not list(tmp_path.iterdir())


def test_a_folder_with_other_settings_is_refused(tmp_path, digits):
    train(RunConfig(**small()), tmp_path, images=digits)
    with pytest.raises(ConfigMismatch, match=r"labels_per_class=1 \(now 2\)"):
        train(RunConfig(labels_per_class=2, **small()), tmp_path, images=digits)


def test_reported_errors_are_those_of_the_saved_weights(tmp_path, digits):
    config = RunConfig(seed=4, **{**small(), "steps": 30})
    results = train(config, tmp_path, images=digits)
    run = build(config, digits)
    model = run.trainer.model
    model.load_state_dict(tensors(tmp_path))
    model.eval()
    for part in ("validation", "test"):
        places = getattr(run.split, part)
        wrong = model(digits.images[places]).argmax(1) != digits.targets[places]
        assert results[f"{part}_error"] == pytest.approx(wrong.float().mean().item())


def test_learns_something(tmp_path, digits):
    config = RunConfig(seed=0, labels_per_class=4, base="supervised", labeled_view="weak", steps=60)
    results = train(config, tmp_path, images=digits)
    assert results["validation_error"] < 0.5
    assert read_jsonl(tmp_path / "metrics.jsonl")[-1]["loss"] < 0.5 * math.log(10)


def test_a_changed_recipe_is_another_run(tmp_path, digits, monkeypatch):
    train(RunConfig(method="l2i", **small()), tmp_path, images=digits)
    changed = dataclasses.replace(METHODS["l2i"], settings={"weight": 0.1})
    monkeypatch.setitem(METHODS, "l2i", changed)
    with pytest.raises(ConfigMismatch, match=r"method_settings\.weight="):
        train(RunConfig(method="l2i", **small()), tmp_path, images=digits)


def test_a_supervised_run_needs_no_unlabeled_pictures(tmp_path):
    pixels = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images = ImageDataset("twelve", pixels, torch.arange(12) % 2, 2)
    found = train(RunConfig(data="twelve", base="supervised", steps=2), tmp_path, images=images)
    assert found["split"]["unlabeled"] == 0
    assert (tmp_path / "unlabeled.csv").read_text().count("\n") == 1
    assert "supervised" in (tmp_path / "report.html").read_text()
