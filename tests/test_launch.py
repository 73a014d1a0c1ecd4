"""Triton's launches without its interpreter, on a GPU that is not there (bench/fake_driver.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]
QUESTIONS = ("straight_path", "new_plans", "scalars", "selected", "hooks")


@pytest.fixture(scope="module")
def answers() -> dict[str, dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "CUDA_VISIBLE_DEVICES": ""}
    script = ROOT / "tests/launch_script.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, cwd=ROOT)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, done.stderr[-4000:]
    return {answer["question"]: answer for answer in found}


@pytest.mark.parametrize("question", QUESTIONS)
def test_launches(question, answers):
    assert answers[question]["failures"] == []


def test_every_operator_was_called(answers):
    assert answers["straight_path"]["calls"] >= 2 * (2 * 6 + 2 * 4)  # two forms of each, a third of four
