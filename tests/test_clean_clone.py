"""What a newcomer has: a clone with the extension built in place, from which everything can be imported."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastmeta
from fastmeta import _extension

ROOT = Path(__file__).parents[1]
IMPORTS = """
import sys
import fastmeta
from fastmeta import _extension, triton_kernels
from fastmeta.triton_kernels import label_gradient, per_example_dot
import bench.gpu.command
assert _extension.REASON is None, _extension.REASON
print(*(module.__file__ for module in (fastmeta, _extension._C, triton_kernels, label_gradient, bench.gpu.command)))
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("newcomer") / "fastmeta"
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("this is no git checkout")
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    return folder


def test_everything_is_importable_in_place(clone):
    pytest.importorskip("triton")
    if _extension._C is None:
        pytest.skip("the C++ extension is not built")
    # As `setup.py build_ext --inplace` leaves it; building it again would take minutes.
    for library in Path(_extension._C.__file__).parent.glob("_C*.so"):
        shutil.copy(library, clone / "fastmeta")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS],
        cwd=clone,
        env=environment | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    paths = [Path(path) for path in done.stdout.split()]
    assert len(paths) == 5
    assert all(path.is_relative_to(clone) for path in paths)
    assert Path(fastmeta.__file__).parent != clone / "fastmeta"
