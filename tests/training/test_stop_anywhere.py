"""Runs that are killed, stopped, broken or spread over other processes, on real files: each ends as if nothing was."""

import dataclasses
import importlib
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from fastmeta.cli import main
from fastmeta.data import ImageDataset, Stream, UnreadableImage
from fastmeta.training import EvaluationConfig, MachineConfig, NotFinite, RunConfig, SplitConfig, build, command, train
from fastmeta.training.checkpoints import CheckpointError
from fastmeta.training.processes import launched
from fastmeta.training.trainer import Trainer

FORK = multiprocessing.get_context("fork")
KILLS = 20
STEPS = 12
FILES = ("model.pt", "metrics.jsonl", "results.json", "details.json", "unlabeled.csv")
PIXELS = torch.rand(120, 1, 8, 8, generator=torch.Generator().manual_seed(1))
IMAGES = ImageDataset("noise", PIXELS, torch.arange(120) % 3, 3)
CONFIG = RunConfig(
    method="l2i",
    steps=STEPS,
    labeled_batch=6,
    unlabeled_batch=8,
    image_size=8,
    split=SplitConfig(holdout_per_class=2, validation_per_class=4, test_fraction=0.25),
    evaluation=EvaluationConfig(every=3),
    machine=MachineConfig(checkpoint_every=2, threads=1, max_skipped=4),
)


@pytest.fixture(autouse=True)
def tiny_net(monkeypatch):
    """Without batch statistics, which are each process's own; forked processes have it too."""

    def build_model(*_, **__):
        return torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.LeakyReLU(), torch.nn.Linear(8, 3)
        )

    # The package's build is the function of that module.
    monkeypatch.setattr(importlib.import_module("fastmeta.training.build"), "build_model", build_model)
    monkeypatch.setattr(command, "load_images", lambda config: IMAGES)
    # The report has tests of its own; to make one takes longer than such a run.
    monkeypatch.setattr(
        importlib.import_module("fastmeta.training.train"), "write_report", lambda runs, out: out.touch()
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Folders of whole runs, by the number of their processes, made when they are asked for."""
    folder = tmp_path_factory.mktemp("whole")

    def run_on(processes):
        place = folder / str(processes)
        if not place.exists():
            assert group(processes, run, place) == processes * [0]
        return place

    return run_on


def run(folder, stop_at=STEPS + 1, on_step=lambda step: None):
    """In a process of its own: the run, up to a step."""
    torch.set_num_threads(1)
    steps = []

    def note(step):
        steps.append(step)
        on_step(step)

    with launched("cpu") as processes:
        train(
            CONFIG, folder, images=IMAGES, processes=processes, on_step=note, should_stop=lambda: steps[-1] >= stop_at
        )


def start(call, *arguments, **environment):
    process = FORK.Process(target=in_environment, args=(environment, call, *arguments))
    process.start()
    return process


def in_environment(environment, call, *arguments):
    os.environ.update(environment)
    code = call(*arguments)
    if isinstance(code, int):
        raise SystemExit(code)


def exit_code(call, *arguments):
    process = start(call, *arguments)
    process.join(60)
    return process.exitcode


def group(processes, call, *arguments):
    """Exit codes of the same call in the processes of a group, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    environment["WORLD_SIZE"] = str(processes)
    started = [start(call, *arguments, RANK=str(rank), **environment) for rank in range(processes)]
    for process in started:
        process.join(60)
    return [process.exitcode for process in started]


def assert_same(folder, other):
    """Byte for byte, and nothing is left over."""
    for name in FILES:
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in other.iterdir())


def tell(begun, folder):
    run(folder, on_step=lambda step: begun.set())


def test_killed_at_random_moments(tmp_path, generator, uninterrupted):
    def begin(folder):
        begun = FORK.Event()  # each its own: one that is killed may hold the event's lock
        process = start(tell, begun, folder)
        assert begun.wait(60)
        return process

    process, started = begin(tmp_path / "0"), time.perf_counter()
    process.join()
    length = time.perf_counter() - started
    kills = resumes = finished = 0
    while kills < KILLS:
        folder = tmp_path / str(finished)
        resumes += bool(list(folder.glob("checkpoints/step-*")))
        process = begin(folder)
        process.join(length * float(torch.rand((), generator=generator)))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode == 0:
            assert_same(folder, uninterrupted(1))
            finished += 1
        else:
            kills += 1
    assert exit_code(run, folder) == 0
    assert_same(folder, uninterrupted(1))
    assert resumes > 0


def counted(call, left):
    def instead(*arguments, **keywords):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **keywords)

    return instead


def killed_at_call(number, folder):
    """Dies before the ``number``-th of the calls that change what is on the disk."""
    left = [number]
    for owner, name in ((os, "fsync"), (os, "replace"), (Path, "unlink"), (shutil, "rmtree")):
        setattr(owner, name, counted(getattr(owner, name), left))
    run(folder)


def test_killed_before_every_change_of_a_file(tmp_path, uninterrupted):
    number = 1
    while exit_code(killed_at_call, number, tmp_path / "run") == -signal.SIGKILL:
        number += 1
    assert number > 8
    assert_same(tmp_path / "run", uninterrupted(1))


def killed_in_the_middle_of_a_file(folder):
    def half(state, file):
        file.write(b"PK" * 100)
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    def on_step(step):
        if step == 7:
            torch.save = half

    run(folder, on_step=on_step)


def test_killed_in_the_middle_of_a_save(tmp_path, uninterrupted):
    folder = tmp_path / "run"
    assert exit_code(killed_in_the_middle_of_a_file, folder) == -signal.SIGKILL
    assert list(folder.glob("checkpoints/.step-*"))
    assert exit_code(run, folder) == 0
    assert_same(folder, uninterrupted(1))


def test_killed_between_the_results_and_the_rest(tmp_path, uninterrupted):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted(1), folder)
    (folder / "report.html").unlink()
    (folder / "checkpoints").mkdir()
    assert exit_code(run, folder) == 0
    assert_same(folder, uninterrupted(1))


def test_on_other_numbers_of_processes_it_is_the_same_to_rounding(tmp_path, uninterrupted):
    folder, whole = tmp_path / "run", uninterrupted(1)
    assert group(1, run, folder, 3) == [0]
    assert group(2, run, folder, 7) == [0, 0]
    assert group(3, run, folder) == [0, 0, 0]
    found, expected = (torch.load(place / "model.pt", weights_only=True) for place in (folder, whole))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    assert not list(folder.glob("checkpoints"))


def kill_one(folder, only_first_time=False):
    def on_step(step):
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if step == 5 and os.environ["RANK"] == "1" and (first or not only_first_time):
            os.kill(os.getpid(), signal.SIGKILL)

    run(folder, on_step=on_step)


def test_when_one_process_is_killed_all_end_and_the_same_command_goes_on(tmp_path, uninterrupted):
    folder = tmp_path / "run"
    begin = time.perf_counter()
    codes = group(3, kill_one, folder)
    assert time.perf_counter() - begin < 60
    assert codes[1] == -signal.SIGKILL
    assert all(code not in (0, None) for code in codes)
    assert group(3, run, folder) == 3 * [0]
    assert_same(folder, uninterrupted(3))


def elastic(folder):
    """As ``torchrun --nproc-per-node=2 --max-restarts=1``."""
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id="run",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=1,
        monitor_interval=0.05,
        start_method="fork",
    )
    elastic_launch(settings, kill_one)(folder, True)


def test_torchrun_goes_on_after_one_process_was_killed(tmp_path, uninterrupted):
    assert exit_code(elastic, tmp_path / "run") == 0
    assert_same(tmp_path / "run", uninterrupted(2))


ARGUMENTS = (
    "train --base fixmatch --method l2i --steps 12 --labeled-batch 6 --unlabeled-batch 8 --image-size 8 "
    "--split.holdout-per-class 2 --split.validation-per-class 4 --split.test-fraction 0.25 --evaluation.every 3 "
    "--machine.checkpoint-every 2 --machine.threads 1 --machine.max-skipped 4 --out"
)


def command_line(folder, number=None):
    torch.set_num_threads(1)
    if number is not None:
        step = Trainer.train_step

        def train_step(trainer):
            step(trainer)
            if trainer.step == 5:
                os.kill(os.getpid(), number)

        Trainer.train_step = train_step
    return main([*ARGUMENTS.split(), str(folder)])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_the_step_reached(tmp_path, uninterrupted, capfd, number, code):
    folder = tmp_path / "run"
    assert exit_code(command_line, folder, number) == code
    assert "the same command continues" in capfd.readouterr().out
    assert list(folder.glob("checkpoints/step-000000005*"))
    assert exit_code(command_line, folder) == 0
    assert_same(folder, uninterrupted(1))


class WithoutOne(ImageDataset):
    """One image cannot be read."""

    lost = -1

    def get(self, places):
        if self.lost in places.tolist():
            raise UnreadableImage(self.lost, self.describe(self.lost), "lost")
        return super().get(places)


def test_an_image_that_could_not_be_read_before_is_still_named(tmp_path):
    config = dataclasses.replace(CONFIG, labels_per_class=22)
    images = WithoutOne("noise", PIXELS, IMAGES.targets, 3)
    labeled = build(config, IMAGES).split.labeled
    first = Stream(IMAGES, labeled, batch_size=6, seed=config.seed, name="labeled")
    images.lost = int(next(first).places[0])  # in the first batch, and in no other up to the last
    results = train(config, tmp_path / "whole", images=images)
    assert list(results["unreadable"]) == [images.describe(images.lost)]

    def stop(step):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", images=images, on_step=stop)
    train(config, tmp_path / "run", images=images)
    assert_same(tmp_path / "run", tmp_path / "whole")


def not_finite(steps):
    """A base loss that is NaN at some steps."""
    loss_of = Trainer._base_loss

    def base_loss(trainer, batch):
        loss = loss_of(trainer, batch)
        return dataclasses.replace(loss, total=loss.total * (torch.nan if trainer.step in steps else 1))

    return base_loss


def test_steps_without_a_finite_loss_are_left_out_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_base_loss", not_finite((3, 5, 6)))
    results = train(CONFIG, tmp_path / "whole", images=IMAGES)
    assert results["skipped_steps"] == 3
    assert exit_code(kill_alone, tmp_path / "killed") == -signal.SIGKILL
    held = [path.name[:14] for path in sorted(tmp_path.glob("killed/checkpoints/step-*"))]
    assert held[-1] == "step-000000002"  # steps 4 and 6 end without a finite loss
    assert exit_code(run, tmp_path / "killed") == 0
    assert_same(tmp_path / "killed", tmp_path / "whole")
    weights = torch.load(tmp_path / "whole" / "model.pt", weights_only=True)
    assert all(value.isfinite().all() for value in weights.values())


def kill_alone(folder):
    def on_step(step):
        if step == 7:
            os.kill(os.getpid(), signal.SIGKILL)

    run(folder, on_step=on_step)


def test_too_many_in_a_row_end_the_run_at_its_last_good_checkpoint(tmp_path, monkeypatch, uninterrupted):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_base_loss", not_finite(range(5, STEPS)))
        with pytest.raises(NotFinite, match=r"last 4 steps was not finite \(step 9; 4 in all\); .* of step 4"):
            train(CONFIG, folder, images=IMAGES)
    assert exit_code(run, folder) == 0
    assert_same(folder, uninterrupted(1))


@pytest.mark.parametrize(("name", "error"), [("checkpoints", CheckpointError), ("metrics.jsonl", OSError)])
def test_a_full_disk_loses_nothing_that_was_saved(tmp_path, uninterrupted, name, error):
    folder = tmp_path / "run"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(step):
        if step == 5:
            size = max(path.stat().st_size for path in folder.rglob("*") if name in str(path) and path.is_file())
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20 if name == "metrics.jsonl" else size // 2, limits[1]))

    try:
        with pytest.raises(error) as caught:
            train(CONFIG, folder, images=IMAGES, on_step=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in str(caught.value)
    assert error is OSError or "last good checkpoint is of step 4" in str(caught.value)
    assert exit_code(run, folder) == 0
    assert_same(folder, uninterrupted(1))
