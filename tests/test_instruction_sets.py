"""The kernels of older processors, and reads beyond the arguments, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastmeta import _extension

LEVELS = ["baseline", "avx2", "avx512"]
SCRIPT = """
from fastmeta import _extension
print(_extension.build_info()["instruction_set_in_use"])
"""


def run(code: list[str], level: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"FASTMETA_ISA": level, "FASTMETA_CHILD": "cpp", "OMP_NUM_THREADS": "2"}
    root = Path(__file__).parents[1]
    return subprocess.run(
        [sys.executable, *code], env=environment, cwd=root, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("level", LEVELS)
def test_kernels(level):
    if _extension._C is None:
        pytest.skip("the C++ extension is not built")
    used = run(["-c", SCRIPT], level)
    if used.stdout.strip() != level:
        assert LEVELS.index(used.stdout.strip()) < LEVELS.index(level), used.stderr
        pytest.skip(f"this processor has {used.stdout.strip()} at most")
    tests = "test_reads_nothing_beyond or (test_matches_float64 and not large)"
    got = run(["-m", "pytest", "tests/test_ops_kernels.py", "-k", tests, "--tb=short", "-p", "no:cacheprovider"], level)
    assert got.returncode == 0, got.stdout[-4000:] + got.stderr[-2000:]
