"""What an installation contains."""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastmeta
from fastmeta import _extension

ROOT = Path(__file__).parents[1]


def test_build_info():
    info = _extension.build_info()
    if info is None:
        pytest.skip("the C++ extension is not built")
    assert set(info) >= {
        "compiler",
        "instruction_sets",
        "instruction_set_in_use",
        "threads",
        "cuda_architectures",
        "built_for_torch",
    }
    assert re.match(r"(gcc|clang) \d+\.\d+", info["compiler"])
    assert info["instruction_set_in_use"] in info["instruction_sets"]
    assert info["instruction_sets"][0] == "baseline"
    assert info["threads"] == torch.get_num_threads()
    assert re.match(r"\d+\.\d+", info["built_for_torch"])
    assert info["cuda_architectures"] == []


def test_typed():
    assert (Path(fastmeta.__file__).parent / "py.typed").is_file()


def test_names_of_the_package():
    assert set(fastmeta.__all__) <= set(dir(fastmeta))
    assert set(fastmeta.ops.__all__) <= set(dir(fastmeta.ops))
    for name in fastmeta.ops.__all__:
        assert callable(getattr(fastmeta.ops, name))
        assert getattr(fastmeta.ops, name).__doc__, f"{name} is not documented"


def test_version():
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^version = "(.*)"', text, re.MULTILINE)[1] == fastmeta.__version__


def test_the_bare_name_triton_kernels_is_not_ours():
    """At the repository's root ``import triton_kernels`` would find our folder; it says what that is."""
    got = subprocess.run(
        [sys.executable, "-c", "import triton_kernels"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert got.returncode != 0
    assert "is the package fastmeta.triton_kernels; install fastmeta and import that" in got.stderr


def test_triton_kernels_is_a_part_of_fastmeta():
    try:
        importlib.metadata.distribution("fastmeta")
    except importlib.metadata.PackageNotFoundError:
        # Built in place: load the folder under the name an installation gives it.
        spec = importlib.util.spec_from_file_location("fastmeta.triton_kernels", ROOT / "triton_kernels/__init__.py")
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    else:
        assert importlib.import_module("fastmeta.triton_kernels").__name__ == "fastmeta.triton_kernels"


def test_importing_is_quiet_and_leaves_torch_as_it_was():
    code = (
        "import torch; before = (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled())\n"
        "import warnings; warnings.simplefilter('error', DeprecationWarning)\n"
        "import fastmeta\n"
        "assert before == (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled())\n"
        "import sys; needless = {'matplotlib', 'sklearn', 'fastmeta.triton_kernels'} & set(sys.modules)\n"
        "assert not needless, f'the core imports {needless}'\n"
    )
    got = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert got.returncode == 0, got.stderr
    assert got.stdout == ""
