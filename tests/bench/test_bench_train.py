"""``python -m bench train``: a small run from end to end, and the stopwatch against a loop by hand."""

import dataclasses
import json
import time

import pytest
import torch

from bench.__main__ import main
from bench.train import command
from bench.train.stopwatch import Stopwatch
from bench.train.task import DEFAULT_METHODS, ON_IMAGENET, TASKS, Task, small
from fastmeta.presets import PRESETS
from fastmeta.training.config import MachineConfig, RunConfig, SplitConfig
from fastmeta.training.processes import Processes

TINY = Task(
    "tiny",
    RunConfig(
        data="generated",
        labels_per_class=2,
        split=SplitConfig(holdout_per_class=1),
        model="conv-net",
        views="pictures",
        labeled_batch=4,
        unlabeled_batch=6,
        steps=100,
    ),
    classes=3,
    pixels=12,
    methods=("none", "l2i", "example-weights", "l2i-jvp-alternating"),
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_from_end_to_end(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "TASKS", {"cpu": (TINY,), "cuda": ()})
    monkeypatch.setattr(command, "START", "fork")
    assert main(["train", "--rounds", "2", "--threads", "1", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "train.json").read_text())["rows"]
    assert [(row["method"], row["processes"]) for row in rows] == [(m, p) for p in (1, 2) for m in TINY.methods]
    for row in rows:
        assert row["images_per_second"] == pytest.approx(10 / (1e-6 * row["median_us"]))
        assert row["hours"] == pytest.approx(100 * 1e-6 * row["median_us"] / 3600)
        assert sum(row["parts"].values()) == pytest.approx(1.0)
        assert all(share >= 0 for share in row["parts"].values())
        assert (row["parts"]["refine"] > 0) == (row["method"] != "none")
    page = (tmp_path / "train.md").read_text()
    assert page.count("| 2 | l2i |") == 2
    assert rows[0]["ratio"] == 1


def test_a_task_that_fails_is_named_and_the_others_go_on(monkeypatch, tmp_path, capsys):
    broken = dataclasses.replace(TINY, name="broken", config=dataclasses.replace(TINY.config, model="no-net"))
    monkeypatch.setattr(command, "TASKS", {"cpu": (broken, TINY), "cuda": ()})
    given = ["train", "--rounds", "1", "--threads", "1", "--processes", "1", "--methods", "l2i", "--out", str(tmp_path)]
    assert main(given) == 0
    results = json.loads((tmp_path / "train.json").read_text())
    assert [row["method"] for row in results["rows"]] == ["none", "l2i"]
    assert "broken, processes: 1" in results["left_out"][0]
    assert "no-net" in (tmp_path / "train.md").read_text()
    assert main([*given, "--tasks", "broken"]) == 1
    assert "Not measured: broken" in capsys.readouterr().err


def test_the_stopwatch_gives_each_part_its_own_time():
    """A part that sleeps has that time, and what it is called from has it not."""
    trainer = TINY.trainer("l2i", MachineConfig(), TINY.images(), Processes())
    trainer.train_step()
    refine, update = trainer.method.method.refine, trainer.average.update

    def slow(function, seconds):
        def call(*arguments, **named):
            time.sleep(seconds)
            return function(*arguments, **named)

        return call

    trainer.method.method.refine, trainer.average.update = slow(refine, 0.2), slow(update, 0.1)
    watch, begin = Stopwatch(trainer), time.perf_counter()
    with watch.running():
        trainer.train_step()
    elapsed = time.perf_counter() - begin
    assert watch.seconds["refine"] > 0.2
    assert watch.seconds["average"] > 0.1
    assert watch.seconds["forward"] < 0.2
    assert watch.seconds["rest"] < 0.1
    assert sum(watch.seconds.values()) == pytest.approx(elapsed, abs=0.02)
    backward = torch.Tensor.backward
    with watch.running():
        pass
    assert torch.Tensor.backward is backward
    trainer.train_step()  # as before
    trainer.batches.close()


def test_tasks():
    assert "none" in DEFAULT_METHODS
    assert len(TASKS["cuda"]) == 1 + len(ON_IMAGENET)
    assert small(64, 448).batch == 512
    for task in TASKS["cuda"][1:]:
        assert task.methods[0] == "none"
        assert task.batch <= 400
        assert task.config.steps == PRESETS[task.name.split(",")[0]].config.steps
