"""csrc/cuda/narrow_plan.h alone: how the kernels for few outputs cut their work. Host arithmetic, no CUDA."""

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import build_cuda
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

SOURCE = Path(__file__).parents[1] / "narrow_plan.cpp"
pytestmark = pytest.mark.skipif(shutil.which(build_cuda.compiler()) is None, reason="no C++ compiler")
LIMITS = ("outputs", "warps", "chunk", "shared", "partials")
PLAN = (
    "padded", "lanes", "blocks", "rows_per_block", "staged", "resident", "row_groups", "residuals", "scratch",
    "shared_bytes",
)  # fmt: skip
LAYOUT = (
    "rows", "teams", "slab", "sums", "spread", "count", "held", "tile_rows", "block_rows", "residual_stride",
)  # fmt: skip
LAYOUTS = list(itertools.product((16, 32), (32, 8)))
MULTIPROCESSORS = 132


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    made = tmp_path_factory.mktemp("narrow") / "plan.so"
    command = [build_cuda.compiler(), "-std=c++20", "-shared", "-fPIC", f"-I{build_cuda.CSRC}", str(SOURCE)]
    subprocess.run([*command, "-o", str(made)], check=True)
    return ctypes.CDLL(str(made))


def ask(function, names, *arguments):
    found = (ctypes.c_int64 * len(names))()
    function(*arguments, found)
    return SimpleNamespace(**dict(zip(names, found, strict=True)))


def plan(library, gradient, n, d, c, matrices=1, multiprocessors=MULTIPROCESSORS, at_most=4):
    numbers = map(ctypes.c_int64, (n, d, c))
    return ask(library.plan, PLAN, at_most if gradient else 0, *numbers, matrices, multiprocessors)


@pytest.mark.parametrize(("padded", "lanes"), LAYOUTS)
def test_each_sum_has_one_place_and_ends_where_its_row_is_held(library, padded, lanes):
    layout = ask(library.layout, LAYOUT, padded, lanes)
    assert layout.sums == layout.rows * padded
    assert layout.tile_rows == layout.rows * 32 // lanes
    assert layout.block_rows == 4 * layout.tile_rows
    assert layout.spread * layout.count == padded
    assert layout.held * layout.count == layout.sums // lanes
    pairs = list(itertools.product(range(layout.rows), range(padded)))
    places = {pair: library.place(padded, lanes, *pair) for pair in pairs}
    assert sorted(places.values()) == list(range(layout.sums))
    # What the lane at the upper bits keeps is the row and the output that the kernel takes it for.
    for (r, c), place in places.items():
        lane, kept = divmod(place, layout.sums // lanes)
        q, m = divmod(kept, layout.count)
        assert lane // layout.spread * layout.held + q == r
        assert lane % layout.spread * layout.count + m == c


@pytest.mark.parametrize(("padded", "lanes"), LAYOUTS)
def test_reads_of_residuals_meet_different_banks(library, padded, lanes):
    layout = ask(library.layout, LAYOUT, padded, lanes)
    first_banks = {team * layout.residual_stride % 32 for team in range(layout.teams)}
    banks = {(first + i) % 32 for first in first_banks for i in range(4)}
    assert len(banks) == 4 * layout.teams


sizes = st.one_of(st.integers(1, 300), st.integers(1, 2**40))


@settings(max_examples=400, deadline=None)
@given(
    gradient=st.booleans(),
    n=sizes,
    d=st.one_of(st.integers(0, 300), st.integers(0, 2**31)),
    c=st.integers(1, 32),
    matrices=st.integers(0, 2),
    multiprocessors=st.sampled_from([1, 8, 108, 132, 148]),
    at_most=st.sampled_from([2, 4]),
)
def test_every_row_has_a_block_and_memory_suffices(library, gradient, n, d, c, matrices, multiprocessors, at_most):
    """At most two where all blocks of a launch have to be resident."""
    limits = ask(library.limits, LIMITS)
    matrices = min(matrices, 1) if gradient else max(matrices, 1)
    p = plan(library, gradient, n, d, c, matrices, multiprocessors, at_most)
    layout = ask(library.layout, LAYOUT, p.padded, p.lanes)
    assert c <= p.padded <= limits.outputs
    assert p.blocks * p.rows_per_block >= n > (p.blocks - 1) * p.rows_per_block
    assert p.blocks <= (at_most if gradient else 4) * multiprocessors
    assert p.rows_per_block % layout.block_rows == 0
    assert limits.chunk % layout.block_rows == 0
    assert p.shared_bytes == 4 * (p.residuals + p.scratch) <= limits.shared
    # Factors: whole slabs, all of them or as many as there is memory for.
    assert p.staged % layout.slab == 0
    assert p.staged >= d or not p.resident
    assert p.staged >= layout.slab or d == 0 or matrices == 0
    assert p.scratch >= (matrices if p.resident else 1) * c * p.staged
    assert p.scratch % 4 == 0, "residuals begin at a vector's address"
    if gradient:
        assert p.residuals >= min(p.rows_per_block, limits.chunk) * layout.residual_stride
        assert p.blocks == 1 or p.blocks * c * (d + 1) <= limits.partials
        assert p.row_groups in (1, 2, 4)
        slabs = -(-d // layout.slab)
        assert p.row_groups == 1 or slabs <= limits.warps // p.row_groups * 2
        # Sums that travel between warps: four features of 16 outputs over the teams, of half the warps.
        travelling = limits.warps // 2 * 32 * 64 // layout.teams
        assert p.row_groups == 1 or p.scratch >= travelling


def test_choices(library):
    """The shapes of training on 132 multiprocessors."""
    few, more, many = (plan(library, False, n, 128, 10) for n in (256, 448, 65536))
    assert (few.lanes, few.blocks, few.rows_per_block) == (32, 32, 8)
    assert (more.lanes, more.blocks) == (32, 56)
    assert (many.lanes, many.blocks, many.rows_per_block) == (8, 512, 128)
    assert all(p.resident and p.padded == 16 for p in (few, more, many))
    assert plan(library, False, 8192, 512, 10, 2).resident
    assert plan(library, False, 64, 128, 17).padded == 32
    assert not plan(library, False, 64, 4096, 10).resident
    # Sums: one launch for a single block, small partial sums beside the features of many rows.
    assert plan(library, True, 32, 128, 10).blocks == 1
    assert plan(library, True, 256, 128, 10).blocks == 32
    assert plan(library, True, 8192, 512, 10).rows_per_block == 64
    assert plan(library, True, 2**20, 128, 10).blocks <= 4 * MULTIPROCESSORS
    assert plan(library, True, 0, 128, 10).blocks == 0
    assert plan(library, False, 0, 128, 10).blocks == 0
