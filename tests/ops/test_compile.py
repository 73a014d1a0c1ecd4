"""torch.compile of code that calls the operators."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SEED

SCRIPT = Path(__file__).parents[1] / "compiled_scripts.py"
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "names",
    [
        "one_opaque_call named_cpp dynamic_shapes head_in_a_module use_impl errors inductor",
        "steps_of_methods",
        "gradients transforms kernel_under_compiled_jvp",
    ],
)
def test_compiled(names):
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(SCRIPT.parent)!r}]; sys.argv[1:] = [{names!r}, '{SEED}']\n"
    code += f"import runpy; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert got.stdout.strip().endswith("done"), got.stdout + got.stderr[-4000:]
