"""The GPU's kernels read nothing beyond their arguments: on the CPU, in a process that a fault may end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases import DEVICE


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU compute-sanitizer looks at it")
def test_reads_nothing_beyond_its_arguments():
    command = [sys.executable, "-m", "pytest", "tests/ops/test_ops_kernels.py", "-k", "test_reads_nothing_beyond"]
    got = subprocess.run(
        [*command, "--tb=short", "-p", "no:cacheprovider"],
        env=os.environ | {"FASTMETA_CHILD": "gpu", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert got.returncode == 0, got.stdout[-4000:] + got.stderr[-2000:]
    assert "passed" in got.stdout, got.stdout[-4000:]
