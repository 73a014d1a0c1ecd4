"""The emulator that the CUDA kernels are tested with: right kernels are right, wrong ones show."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import build_cuda
import pytest
import torch

ROOT = Path(__file__).parents[2]
THREADS = 96
ORDERS = ["forward", "reverse", "random"]
pytestmark = pytest.mark.skipif(shutil.which(build_cuda.compiler()) is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    made = tmp_path_factory.mktemp("emulator") / "kernels.so"
    command = [build_cuda.compiler(), "-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    sources = [ROOT / "tests/emulated_kernels.cpp", build_cuda.CSRC / "cuda/emulator.cpp"]
    subprocess.run([*command, f"-I{build_cuda.CSRC}", *map(str, sources), "-o", str(made)], check=True)
    loaded = ctypes.CDLL(str(made))
    loaded.launch.restype = ctypes.c_char_p
    return loaded


@pytest.fixture
def launch(library):
    def call(name, size=1, blocks=1, threads=THREADS, shared_bytes=0):
        out = torch.zeros(size)
        address = ctypes.c_void_p(out.data_ptr())
        words = library.launch(name.encode(), address, blocks, threads, ctypes.c_uint64(shared_bytes)).decode()
        if words:
            raise RuntimeError(words)
        return out

    return call


@pytest.fixture(params=ORDERS)
def order(request, monkeypatch):
    monkeypatch.setenv("FASTMETA_EMULATION_ORDER", request.param)
    return request.param


def test_barriers_and_blocks(launch, order):
    got = launch("reverse", 5 * THREADS, blocks=5)
    assert torch.equal(got, torch.arange(5 * THREADS).view(5, THREADS).flip(1).flatten().float())
    t = torch.arange(THREADS)
    assert torch.equal(launch("two rounds", THREADS), 1001.0 * ((t + 1) % THREADS + 1))


def test_a_missing_barrier_shows(launch, order):
    right = launch("reverse", THREADS)
    assert not torch.equal(launch("reverse without barrier", THREADS), right)
    right = launch("two rounds", THREADS)
    assert not torch.equal(launch("two rounds without barrier", THREADS), right)


def test_some_warps_get_ahead_of_others(launch, monkeypatch):
    """At random alone: elsewhere all threads take a step before any takes two."""
    monkeypatch.setenv("FASTMETA_EMULATION_ORDER", "random")
    right = torch.full((THREADS,), 3.0 * THREADS)
    assert all(torch.equal(launch("two sums", THREADS), right) for _ in range(20))
    assert not all(torch.equal(launch("two sums without barrier", THREADS), right) for _ in range(20))


def test_warp_operations(launch, order):
    t = torch.arange(THREADS)
    lane = t % 32
    sums, at, down, up, odd, half, counted = launch("warps", 7 * THREADS).view(7, THREADS)
    assert torch.equal(sums, t.view(-1, 8).sum(1).repeat_interleave(8).float())
    assert torch.equal(at, (t // 16 * 16 + 5).float())
    assert torch.equal(down, torch.where(lane < 29, t + 3, t).float())
    assert torch.equal(up, torch.where(lane >= 3, t - 3, t).float())
    assert odd.all()
    assert torch.equal(half, torch.where(lane < 16, 5.0, 0.0))
    assert (counted == THREADS / 3).all()


def test_blocks_wait_for_each_other(launch, order):
    """Twice the same: the fibers of one launch serve the next."""
    for blocks in (1, 7, 16, 3):
        sums = launch("across blocks", 2 * blocks, blocks=blocks)[:blocks]
        assert (sums == 6 * blocks * (blocks + 1) / 2).all()
    assert (launch("across blocks with one barrier", 14, blocks=7)[:7] != 6 * 28).any()


def test_shared_memory_starts_as_nan_in_every_block(launch, order):
    got = launch("uninitialized", 6, blocks=3, threads=1, shared_bytes=4)
    assert got[:2].tolist() == [1, 1]
    assert got[2:].isnan().all()


def test_orders_of_blocks(launch, order):
    got = launch("tickets", 40, blocks=40, threads=1)
    forward = torch.arange(40.0)
    expected = {"forward": forward, "reverse": forward.flip(0)}
    if order in expected:
        assert torch.equal(got, expected[order])
    else:
        assert torch.equal(got.sort().values, forward)
        assert not torch.equal(got, launch("tickets", 40, blocks=40, threads=1))


def test_a_lane_that_has_ended_sends_nan(launch):
    got = launch("absent lane", 32, threads=32)
    assert got[torch.arange(32) != 3].isnan().all()


@pytest.mark.parametrize(
    ("kernel", "shape", "words"),
    [
        ("stuck", {}, "threads of a block wait for others that never come"),
        ("outside its mask", {}, "a warp operation whose mask leaves it out"),
        ("leaves early", {"blocks": 3}, "blocks wait at the grid's barrier for others that have ended"),
        ("thread leaves early", {"blocks": 3}, "threads of a block wait for others that never come"),
        ("not cooperative", {"blocks": 3}, "a barrier of the grid in a launch that is not cooperative"),
        ("nothing together", {"blocks": 8 * 21 + 1}, "more blocks than are resident at once"),
        ("nothing together", {"blocks": 17, "shared_bytes": 80 * 1024}, "more blocks than are resident at once"),
        ("nothing", {"threads": 1025}, "a block must have 1 to 1024 threads"),
        ("nothing", {"threads": 0}, "a block must have 1 to 1024 threads"),
        ("nothing", {"blocks": 2**31}, "a grid too large"),
        ("nothing", {"shared_bytes": 163 * 1024 + 1}, "more shared memory than every GPU has"),
        ("uninitialized", {"shared_bytes": 48 * 1024}, "more shared memory than a launch has, or than it has asked"),
    ],
)
def test_what_a_gpu_would_refuse(launch, kernel, shape, words):
    with pytest.raises(RuntimeError, match=words):
        launch(kernel, **shape)
    assert torch.equal(launch("two rounds", THREADS), 1001.0 * ((torch.arange(THREADS) + 1) % THREADS + 1))


def test_unknown_order(launch, monkeypatch):
    monkeypatch.setenv("FASTMETA_EMULATION_ORDER", "sideways")
    with pytest.raises(RuntimeError, match="must be forward, reverse or random, got sideways"):
        launch("nothing")
