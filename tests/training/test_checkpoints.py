"""Checkpoints on real files: what a kill, a full disk and a broken file leave."""

import errno
import multiprocessing
import os
import resource
import shutil
import time
import warnings

import pytest
import torch
import torch.distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from fastmeta.training.checkpoints import VERSION, CheckpointError, Checkpoints
from fastmeta.training.files import replace

FORK = multiprocessing.get_context("fork")


def state(step, size=1000):
    return {
        "step": step,
        "model": {"weight": torch.full((size,), float(step)), "count": torch.tensor(step)},
        "rows": [{"step": each, "loss": each / 3} for each in range(step)],
        "best": (float("inf"), None, "student"),
    }


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == other


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("sharded", [False, True])
def test_the_newest_is_read_back_as_it_was(tmp_path, sharded):
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", sharded=sharded)
    assert checkpoints.latest() is None
    assert checkpoints.best() is None
    path = checkpoints.save(3, state(3))
    checkpoints.save(5, state(5))
    assert path.exists()
    step, held = Checkpoints(checkpoints.folder, sharded=sharded).latest()
    assert step == 5
    assert same(held, state(5))


@pytest.mark.parametrize("sharded", [False, True])
def test_the_last_and_the_best_are_kept(tmp_path, sharded):
    checkpoints = Checkpoints(tmp_path, keep=2, sharded=sharded)
    kept = []
    for step, is_best in ((1, True), (2, False), (3, True), (4, False), (5, False), (6, True), (6, False)):
        checkpoints.save(step, state(step), is_best=is_best)
        kept.append([name.removesuffix(".pt").replace("step-00000000", "") for name in names(tmp_path)])
        best = Checkpoints(tmp_path, sharded=sharded).best()
        assert best[0] == best[1]["step"] == max(each for each in (1, 3, 6) if each <= step)
    assert kept == [
        ["1.best"],
        ["1.best", "2"],
        ["2", "3.best"],
        ["3.best", "4"],
        ["3.best", "4", "5"],
        ["5", "6.best"],
        ["5", "6.best"],  # saved twice, it stays the best
    ]


def flip(path):
    """One bit in the middle of a tensor."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def change(**changes):
    def write(path):
        torch.save({**torch.load(path, weights_only=True), **changes}, path)

    return write


@pytest.mark.parametrize(
    ("harm", "cause"),
    [
        (flip, r"corrupt: the checksum of \S*data/\d does not match"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "cut off, or not a checkpoint"),
        (lambda path: path.write_bytes(b""), "cut off, or not a checkpoint"),
        (lambda path: torch.save({"weight": torch.ones(2)}, path), "not a checkpoint of fastmeta"),
        (lambda path: torch.save(test_a_broken_one_is_passed_over, path), "cannot be read: Weights only load failed"),
        (change(version=VERSION + 1), f"format {VERSION + 1} of a newer fastmeta, this one reads {VERSION}"),
        (change(fingerprint="other"), "of other settings: 'other', not 'mine'"),
        (change(step=99), "renamed: it is of step 99"),
        (lambda path: (path.unlink(), path.mkdir()), "it is sharded, this run is not"),
    ],
)
def test_a_broken_one_is_passed_over(tmp_path, harm, cause):
    checkpoints = Checkpoints(tmp_path, fingerprint="mine")
    paths = [checkpoints.save(step, state(step)) for step in (1, 2)]
    harm(paths[1])
    again = Checkpoints(tmp_path, fingerprint="mine")
    with pytest.warns(UserWarning, match=f"{paths[1].name}: .*{cause}") as warned:
        step, held = again.latest()
    assert len(warned) == 1
    assert "\n" not in str(warned[0].message)
    assert step == 1
    assert same(held, state(1))
    assert paths[1].exists()
    for step in (3, 4):  # it does not count among those that are kept
        again.save(step, state(step))
    assert len(names(tmp_path)) == 3


def test_nothing_starts_from_zero_where_all_are_broken(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        flip(checkpoints.save(step, state(step)))
    with pytest.warns(UserWarning, match="passed over"), pytest.raises(CheckpointError) as caught:
        checkpoints.latest()
    assert "none of 2 checkpoints can be read" in str(caught.value)
    assert all(name in str(caught.value) for name in (*names(tmp_path), str(tmp_path)))


@pytest.mark.parametrize("sharded", [False, True])
def test_a_full_disk_leaves_all_earlier_ones(tmp_path, sharded):
    checkpoints = Checkpoints(tmp_path, sharded=sharded)
    checkpoints.save(1, state(1))
    before = names(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # as a full disk, in the middle of a file
    try:
        with pytest.raises(CheckpointError, match=r"step 2 could not .*: File too large; the last good .* of step 1$"):
            checkpoints.save(2, state(2, size=1_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == before
    assert same(checkpoints.latest()[1], state(1))
    checkpoints.save(2, state(2, size=1_000_000))
    assert checkpoints.latest()[0] == 2


def test_what_the_disk_says_at_the_last_moment_counts(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)

    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device; there is no earlier checkpoint"):
        checkpoints.save(1, state(1))
    assert names(tmp_path) == []


def test_files_are_on_the_disk_before_they_get_their_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def call(*arguments, name=name, real=real):
            calls.append(name)
            return real(*arguments)

        monkeypatch.setattr(os, name, call)
    Checkpoints(tmp_path).save(1, state(1))
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, the folder
    calls.clear()
    replace(tmp_path / "quick", lambda file: file.write(b"1"))
    assert calls == ["replace"]


def test_what_cannot_be_read_back_is_known_at_the_first_save(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match=r"step 1 could not be saved .*Weights only load failed"):
        checkpoints.save(1, {"folder": tmp_path})
    assert names(tmp_path) == []


def test_keep_is_positive(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        Checkpoints(tmp_path / "new", keep=0)
    assert not (tmp_path / "new").exists()


def save_for_ever(folder, sharded):
    checkpoints, step = Checkpoints(folder, sharded=sharded), 0
    while True:
        step += 1
        checkpoints.save(step, state(step % 100, size=100_000), is_best=step % 7 == 0)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_kill_at_any_moment_leaves_whole_ones(tmp_path, generator, sharded):
    pauses = (0.1 * torch.rand(8, generator=generator)).tolist()
    for number, pause in enumerate(pauses):
        folder = tmp_path / str(number)
        process = FORK.Process(target=save_for_ever, args=(folder, sharded))
        process.start()
        while not list(folder.glob("step-*")):
            time.sleep(0.001)
        time.sleep(pause)
        process.kill()
        process.join()
        checkpoints = Checkpoints(folder, sharded=sharded)
        assert not list(folder.glob(".step-*"))
        step, held = checkpoints.latest()
        assert step == max(int(path.name[5:14]) for path in folder.iterdir())
        assert same(held, state(step % 100, size=100_000))
        assert step < 7 or checkpoints.best()[0] == step - step % 7
        shutil.rmtree(folder)


def in_a_group(rank, world, folder, call, results):
    torch.distributed.init_process_group(
        "gloo", init_method=(folder / f"meeting-{call.__name__}-{world}").as_uri(), rank=rank, world_size=world
    )
    results.put((rank, call(folder)))
    torch.distributed.destroy_process_group()


def together(world, folder, call):
    """What ``call(folder)`` returns on each of ``world`` processes of a group."""
    results = FORK.Queue()
    processes = [FORK.Process(target=in_a_group, args=(rank, world, folder, call, results)) for rank in range(world)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return [found[rank] for rank in range(world)]


def spread(value, world):
    whole = torch.arange(10.0).view(5, 2) + value
    return distribute_tensor(whole, init_device_mesh("cpu", (world,)), [Shard(0)])


def save_in_a_group(folder):
    world = torch.distributed.get_world_size()
    plain, sharded = Checkpoints(folder / "plain"), Checkpoints(folder / "sharded", sharded=True)
    plain.save(1, state(1 + torch.distributed.get_rank()))
    for step in (1, 2):
        sharded.save(step, {**state(step), "table": spread(step, world)})
    return plain.latest()[1]["step"], names(plain.folder), names(sharded.folder)


def read_in_a_group(folder):
    like = {"table": spread(0, torch.distributed.get_world_size())}
    step, held = Checkpoints(folder / "sharded", sharded=True).latest(like)
    return step, held.pop("table").full_tensor().tolist(), same(held, state(step))


def read_broken_in_a_group(folder):
    checkpoints = Checkpoints(folder / "plain")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises(CheckpointError, match="none of 1 checkpoints can be read"):
            checkpoints.latest()
    return len(warned)


def fill_the_disk_in_a_group(folder):
    """Of the second process alone."""
    checkpoints = Checkpoints(folder / "sharded", sharded=True)
    table = spread(torch.zeros(100_000, 5, 2), torch.distributed.get_world_size())
    if torch.distributed.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with pytest.raises(CheckpointError, match=r"process 1: .* \(is the disk full\?\); the last .* of step 2"):
        checkpoints.save(3, {"table": table})
    torch.distributed.barrier()
    return names(checkpoints.folder)


def test_processes_of_a_group_save_and_read_together(tmp_path):
    saved = ["step-000000001", "step-000000002"]
    assert together(2, tmp_path, save_in_a_group) == 2 * [(1, ["step-000000001.pt"], saved)]
    table = (torch.arange(10.0).view(5, 2) + 2).tolist()
    assert together(3, tmp_path, read_in_a_group) == 3 * [(2, table, True)]
    assert together(2, tmp_path, fill_the_disk_in_a_group) == 2 * [saved]
    flip(next((tmp_path / "sharded" / saved[1]).glob("__1_*")))
    assert together(2, tmp_path, read_in_a_group) == 2 * [(1, (torch.arange(10.0).view(5, 2) + 1).tolist(), True)]
    flip(tmp_path / "plain" / "step-000000001.pt")
    assert together(2, tmp_path, read_broken_in_a_group) == [1, 0]
