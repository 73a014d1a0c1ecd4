"""The executor of compiled programs, on a GPU that is not there (bench/fake_driver.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
QUESTIONS = (
    "parameters",
    "compiling_launches_nothing",
    "hooks",
    "entries",
    "operators",
    "numbers",
    "precision",
    "errors",
)


@pytest.fixture(scope="module")
def answers() -> dict[str, dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "CUDA_VISIBLE_DEVICES": ""}
    script = ROOT / "tests/executor_script.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, cwd=ROOT)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, done.stderr[-4000:]
    return {answer["question"]: answer for answer in found}


@pytest.mark.parametrize("question", QUESTIONS)
def test_programs(question, answers):
    assert answers[question]["failures"] == []
