"""perturbed, alignment_direction and masked_adam_ as older processors run them, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastmeta import _extension

LEVELS = ["baseline", "avx2", "avx512"]
FILES = [f"tests/ops/test_{name}.py" for name in ("perturbed", "alignment_direction", "masked_adam")]
# Refuses to test anything but the wanted instruction set.
SCRIPT = """
import sys, pytest
from fastmeta._extension import build_info
used, wanted, *arguments = build_info()["instruction_set_in_use"], *sys.argv[1:]
sys.exit(pytest.main(arguments) if used == wanted else f"uses {used}")
"""


@pytest.mark.parametrize("level", LEVELS)
def test_errors_against_float64(level):
    info = _extension.build_info()
    if info is None:
        pytest.skip("the C++ extension is not built")
    if LEVELS.index(level) >= LEVELS.index(str(info["instruction_set_in_use"])):
        pytest.skip("the tests of this process are for that one, or this processor does not have it")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            SCRIPT,
            level,
            *FILES,
            "-k",
            "float64 and cpp or special and cpp",
            "-p",
            "no:cacheprovider",
        ],
        env=os.environ | {"FASTMETA_ISA": level, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
