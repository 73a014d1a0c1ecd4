"""The kernels of older processors, and reads beyond the arguments, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastmeta import _extension

LEVELS = ["baseline", "avx2", "avx512"]
TESTS = "test_reads_nothing_beyond or (test_matches_float64 and not large)"
# Refuses to test anything but the wanted instruction set.
SCRIPT = """
import sys, pytest
from fastmeta._extension import build_info
used, wanted, *arguments = build_info()["instruction_set_in_use"], *sys.argv[1:]
sys.exit(pytest.main(arguments) if used == wanted else f"uses {used}")
"""


@pytest.mark.parametrize("level", LEVELS)
def test_kernels(level):
    info = _extension.build_info()
    if info is None:
        pytest.skip("the C++ extension is not built")
    used = str(info["instruction_set_in_use"])
    if LEVELS.index(used) < LEVELS.index(level):
        pytest.skip(f"there is {used} at most")
    arguments = ["tests/ops/test_ops_kernels.py", "-k", TESTS, "--tb=short", "-p", "no:cacheprovider"]
    got = subprocess.run(
        [sys.executable, "-c", SCRIPT, level, *arguments],
        env=os.environ | {"FASTMETA_ISA": level, "FASTMETA_CHILD": "cpp", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert got.returncode == 0, got.stdout[-4000:] + got.stderr[-2000:]
