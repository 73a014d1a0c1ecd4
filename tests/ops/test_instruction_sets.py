"""The C++ kernels in every instruction set of this processor, in processes of their own: it is chosen once.

The row kernels run with their arguments at the edge of memory that may not be read, where a fault would end pytest.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastmeta import _extension

LEVELS = ["baseline", "avx2", "avx512"]
# Refuses to test anything but the wanted instruction set.
SCRIPT = """
import sys, pytest
from fastmeta._extension import build_info
used, wanted, *arguments = build_info()["instruction_set_in_use"], *sys.argv[1:]
sys.exit(pytest.main(arguments) if used == wanted else f"uses {used}")
"""
levels = pytest.mark.parametrize("level", LEVELS)


def used() -> int:
    """The place in LEVELS of what this process uses."""
    info = _extension.build_info()
    if info is None:
        pytest.skip("the C++ extension is not built")
    return LEVELS.index(str(info["instruction_set_in_use"]))


def passes(level: str, files: list[str], tests: str, **environment: str) -> None:
    """Run these tests in the instruction set ``level``."""
    command = [sys.executable, "-c", SCRIPT, level, *files, "-k", tests, "--tb=short", "-p", "no:cacheprovider"]
    got = subprocess.run(
        command,
        env=os.environ | {"FASTMETA_ISA": level, "OMP_NUM_THREADS": "1"} | environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert got.returncode == 0, got.stdout[-6000:] + got.stderr[-2000:]


@levels
def test_row_kernels(level):
    if LEVELS.index(level) > used():
        pytest.skip("this processor does not have it")
    tests = "test_reads_nothing_beyond or (test_matches_float64 and not large)"
    passes(level, ["tests/ops/test_ops_kernels.py"], tests, FASTMETA_CHILD="cpp")


@levels
def test_kernels_of_lists_and_tables(level):
    if LEVELS.index(level) >= used():
        pytest.skip("the tests of this process are for that one, or this processor does not have it")
    files = [f"tests/ops/test_{name}.py" for name in ("perturbed", "alignment_direction", "masked_adam")]
    passes(level, files, "float64 and cpp or special and cpp")
