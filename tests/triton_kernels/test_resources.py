"""``python -m bench resources``: what can be launched is compiled; and what the command says of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
SPILLING = """
import triton, triton.language as tl
@triton.jit
def spilling(x_ptr, size: tl.constexpr):
    at = tl.arange(0, size)
    x = tl.load(x_ptr + at)
    tl.store(x_ptr + at, x / tl.sum(x.to(tl.float32), 0))
@triton.jit
def large(a_ptr, size: tl.constexpr):
    at = tl.arange(0, size)[:, None] * size + tl.arange(0, size)[None]
    tl.store(a_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(a_ptr + at + 1)))
@triton.jit
def wrong(x_ptr, size: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, size), undefined)
"""


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "bench", "resources", *arguments],
        cwd=ROOT,
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
    )


def test_quick(tmp_path):
    """Every tile of every Triton kernel compiles, without spills and within the shared memory there is."""
    done = command("--quick", "--json", str(tmp_path / "found.json"), "--markdown", str(tmp_path / "table.md"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["problems"] == []
    operators = {operator for row in found["triton"] for operator in row["operators"]}
    assert operators == {
        "last_layer_gradient",
        "per_example_dot",
        "label_gradient",
        "hessian_vector_product",
        "feature_similarity",
        "finite_difference_labels",
        "solve_hessian",
    }
    architectures = {name for row in found["triton"] for name in row["registers"]}
    assert architectures == {"sm_80", "sm_90", "sm_100"}
    assert all(8 <= count <= 255 for row in found["triton"] for count in row["registers"].values())
    assert "all compile, without spills, and fit" in (tmp_path / "table.md").read_text()


def test_the_interpreter_compiles_nothing():
    done = command(TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "unset TRITON_INTERPRET" in done.stderr


def test_what_does_not_compile_or_fit_is_told(tmp_path):
    (tmp_path / "bad_kernels.py").write_text(SPILLING)
    script = """
import json, torch, bad_kernels
from bench.compiled import compile_one, work
from fastmeta.triton_kernels._program import Recorded
x = torch.empty(1 << 16, dtype=torch.bfloat16, device="meta")
launches = {"spills": ("spilling", 16384, 1), "large": ("large", 256, 16), "wrong": ("wrong", 16, 4)}
for name, (kernel, size, warps) in launches.items():
    options = {"num_warps": warps, "num_stages": 2}
    launch = Recorded(getattr(bad_kernels, kernel), (1, 1, 1), (x,), {"size": size}, options)
    print(json.dumps([name, compile_one(work(launch, 80)).problem]))
"""
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    done = subprocess.run(
        [sys.executable, "-c", script], env=ENVIRONMENT | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    problems = dict(json.loads(line) for line in done.stdout.splitlines())
    assert problems["spills"].endswith("bytes of spills")
    assert problems["large"].endswith("bytes of shared memory")
    assert "undefined is not defined" in problems["wrong"]
