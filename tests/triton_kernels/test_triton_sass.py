"""The row kernels' machine code: in the loop over a row no thread waits for another; many rows fit a processor."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def kernels() -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "tests/sass_script.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_no_barrier_and_no_shuffle_in_the_loop_over_a_row(kernels):
    long_rows = [kernel for kernel in kernels if kernel["classes"] == 9000]
    assert len(long_rows) == 17
    for kernel in long_rows:
        loops = [loop for loop in kernel["loops"] if loop["LDG"]]
        assert loops, kernel
        for loop in loops:
            assert loop["BAR"] == 0, kernel
            assert loop["SHFL"] == 0, kernel


def test_results_of_one_number_take_one_sweep(kernels):
    for kernel in kernels:
        if kernel["classes"] == 9000:
            sweeps = sum(loop["LDG"] > 0 for loop in kernel["loops"])
            of_rows = kernel["kernel"].startswith("per_example_dot")
            of_label_step = kernel["kernel"].startswith("finite_difference")
            assert sweeps == (1 if of_rows else 3 if of_label_step else 2), kernel


def test_registers(kernels):
    """At most 64: 1,024 threads of a processor, and nothing on the stack."""
    for kernel in kernels:
        assert kernel["registers"] <= 64, kernel
        assert kernel["stack"] == 0, kernel
