"""``python -m bench compile``: what a machine without a GPU compiles is found by Triton on one that has it."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bench import compile as command
from bench.gpu import cache

triton = pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
# The command, for one kernel.
COMPILE = """
import torch
from bench import kernels, specimens
from bench.__main__ import main
given = specimens.arguments("finite_difference_labels", (64, 8, 100), torch.float32, specimens.Specimen())
launches = kernels.launches_of("finite_difference_labels", 100, given)
specimens.launches = lambda quick: [specimens.Found("finite_difference_labels", "float32", one) for one in launches]
raise SystemExit(main(["compile", "--quick", "--processes", "1", *{options!r}]))
"""
# As a user's call does, down to a driver that launches nothing.
CALL = """
import json, sys, torch, triton
from bench import fake_driver
from fastmeta import _extension
from fastmeta.dispatch import OPERATORS
fake_driver.activate(90)
hits = []
def listener(*, src, metadata, metadata_group, times, cache_hit):
    hits.append([cache_hit, sorted(metadata_group.values())])
triton.knobs.compilation.listener = listener
x = torch.rand(64, 100)
name = "finite_difference_labels"
OPERATORS[name].planned(_extension.new_entry(name, "cpu"))(x, x, x, torch.tensor(0.5), 0.5, True)
print(json.dumps(hits))
"""


def run(code: str, folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= cache.environment(folder) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The installed Triton as a wheel, its library another one."""
    path = tmp_path_factory.mktemp("wheel") / f"triton-{triton.__version__}-cp399-cp399-linux.whl"
    folder = Path(triton.__file__).parent
    with zipfile.ZipFile(path, "w") as file:
        for source in folder.rglob("*.py"):
            file.write(source, f"triton/{source.relative_to(folder).as_posix()}")
        file.writestr("triton/_C/libtriton.so", b"another one")
    return path


def made(tmp_path: Path, *options: str) -> Path:
    """Where the archive that the command makes is unpacked."""
    archive = tmp_path / "archive.tar.gz"
    said = run(COMPILE.format(options=["--archive", str(archive), *options]), tmp_path / "unused")
    assert said.startswith(f"{archive}: 1 kernels")
    cache.unpack(archive, tmp_path / "new", tmp_path)
    assert not (tmp_path / "fastmeta").exists()  # no libraries beside other sources
    return tmp_path / "new"


def test_triton_finds_what_was_compiled_elsewhere(tmp_path):
    new = made(tmp_path)
    hits = json.loads(run(CALL, new))
    assert [hit for hit, _ in hits] == [True]
    paths = [Path(path) for _, group in hits for path in group]
    assert any(path.suffix == ".cubin" for path in paths)
    assert all(path.is_relative_to(new) and path.is_file() for path in paths)


def test_what_is_compiled_for_another_build_of_triton_is_that_builds(tmp_path, wheel):
    new = made(tmp_path, "--triton-wheel", str(wheel))
    assert len(list(new.glob("triton/*/*.cubin"))) == 1
    assert [hit for hit, _ in json.loads(run(CALL, new))] == [False]


def test_the_key_of_a_wheel_differs_by_its_library_alone(wheel):
    from triton.runtime.cache import triton_key

    mine, other = (key.split("-") for key in (triton_key(), command.triton_key(wheel)))
    assert len(mine) == len(other)
    assert sum(one != two for one, two in zip(mine, other, strict=True)) == 1


def test_a_wheel_of_another_version_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"expected triton {triton.__version__} as installed here, got triton-2"):
        command.triton_key(tmp_path / "triton-2.0.0-cp312-linux.whl")
