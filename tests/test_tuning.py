"""Recorded tiles: looked up in planning, measured only when asked; timed here by a table of made-up times."""

import json
import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from cases import CASES, DEVICE, Draw

pytest.importorskip("triton")
from fastmeta.triton_kernels import _tuning
from fastmeta.triton_kernels import finite_difference_labels as module

CASE = next(case for case in CASES if case.name == "finite_difference_labels")


class Tile(NamedTuple):
    rows: int
    num_warps: int


TABLE = (Tile(16, 2), Tile(32, 4), Tile(64, 8))


@pytest.fixture(autouse=True)
def nothing_recorded(monkeypatch):
    monkeypatch.setattr(_tuning, "_choices", {})


def ask(shape=(256, 10), dtype=torch.float32, table=TABLE, heuristic=TABLE[1], kernel="one"):
    return _tuning.tile(kernel, dtype, shape, table, heuristic)


def fastest(*order: Tile):
    """A timer by which the first of these is the fastest, whatever the call; slower the later."""

    def time(call) -> float:
        with _tuning.requested() as requests:
            call()
        (request,) = requests
        return float(order.index(ask(table=request.table, heuristic=request.table[0], kernel=request.kernel)))

    return time


def test_the_heuristic_serves_what_was_not_recorded():
    assert ask() == TABLE[1]
    with pytest.raises(AssertionError, match="not in the table of one"):
        ask(heuristic=Tile(1, 1))


def test_bucket():
    assert _tuning.bucket(torch.bfloat16, (256, 10, 1000)) == "bfloat16 256x16x1024"
    assert _tuning.bucket(torch.float32, (0, 1, 2, 3)) == "float32 1x1x2x4"


def test_tune_records_the_fastest_by_bucket(tmp_path):
    path = tmp_path / "tuned" / "chip.json"
    _tuning.tune(ask, path, timer=fastest(TABLE[2], TABLE[0], TABLE[1]))
    assert ask() == TABLE[2]
    assert ask(shape=(200, 9)) == TABLE[2]  # the same bucket: another batch is not tuned again
    for other in (dict(shape=(257, 10)), dict(dtype=torch.bfloat16), dict(kernel="two")):
        assert ask(**other) == TABLE[1]
    assert ask(table=TABLE[:2]) == TABLE[1]  # what was recorded is not valid here
    assert json.loads(path.read_text()) == {
        "chip": _tuning.chip_name(),
        "tiles": {"one": {"float32 256x16": {"rows": 64, "num_warps": 8}}},
    }


def test_tune_keeps_what_the_file_holds_of_others(tmp_path):
    path = tmp_path / "chip.json"
    _tuning.tune(ask, path, timer=fastest(TABLE[0], *TABLE[1:]))
    held = _tuning.tune(lambda: ask(kernel="two"), path, timer=fastest(TABLE[2], *TABLE[:2]))
    assert {kernel: tiles["float32 256x16"]["rows"] for kernel, tiles in held.items()} == {"one": 16, "two": 64}


def test_load(tmp_path):
    path = tmp_path / "chip.json"
    _tuning.tune(ask, path, timer=fastest(TABLE[0], *TABLE[1:]))
    _tuning._choices.clear()
    assert ask() == TABLE[1]
    _tuning.load(path)
    assert ask() == TABLE[0]
    path.write_text(json.dumps({"chip": "another", "tiles": {}}))
    with pytest.raises(ValueError, match="holds tiles for another"):
        _tuning.load(path)


def test_a_file_named_in_the_environment_is_read_at_import(tmp_path):
    path = tmp_path / "chip.json"
    _tuning.tune(ask, path, timer=fastest(TABLE[2], *TABLE[:2]))
    script = "import json; from fastmeta.triton_kernels import _tuning; print(json.dumps(_tuning._choices))"
    environment = os.environ | {"FASTMETA_TUNED": str(path)}
    found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert json.loads(found.stdout or found.stderr) == _tuning._choices


def test_using_overrules_what_was_recorded(tmp_path):
    _tuning.tune(ask, tmp_path / "chip.json", timer=fastest(TABLE[2], *TABLE[:2]))
    with _tuning.using("one", TABLE[0]):
        assert ask() == TABLE[0]
        with _tuning.using("two", TABLE[1]):
            assert ask() == TABLE[0]
        assert ask(table=TABLE[1:]) == TABLE[2]
    assert ask() == TABLE[2]


@pytest.mark.skipif("triton" not in CASE.operator.implementations(DEVICE), reason="no Triton kernel here")
def test_an_operator_takes_what_was_recorded(tmp_path, generator):
    """From the next call on: plans made before are forgotten."""
    arguments = CASE.arguments(Draw(generator, torch.float32), (7, 1, 12), None, "project")
    before = CASE.call(arguments, "triton")[0]
    timed = []

    def timer(call) -> float:
        call()
        (plan,) = module._PLANS.values()
        timed.append(plan.launch.constants["block_rows"])
        return -float(timed[-1])

    _tuning.tune(lambda: CASE.call(arguments, "triton"), tmp_path / "chip.json", timer=timer)
    assert sorted(timed) == [16, 32]
    again = CASE.call(arguments, "triton")[0]
    (plan,) = module._PLANS.values()
    assert plan.launch.constants["block_rows"] == 32
    assert torch.equal(before, again)
