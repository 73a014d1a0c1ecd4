"""No figures for an operator whose tests fail: runs them, and reads the lines that ``bench.pytest_outcomes`` writes."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FILE = "FASTMETA_BENCH_OUTCOMES"  # names the file
# In an interpreter and an emulator kernels of the GPU are slow, and not what is measured on a CPU.
NOT_ON_A_CPU = ("-k", "not triton and not cuda")
Row = dict[str, Any]


def summarize(paths: Sequence[Path], stems: Mapping[str, str]) -> Row:
    """Counts, failures and reasons for skips, and a verdict on each operator.

    A test belongs to the operators named in its id, by the operator's name or its file's; one of ``test_ops*.py`` that
    names none belongs to all, any other to none.

    Args:
        paths: the plugin's files.
        stems: the stem of each operator's test files.
    """
    written = [line for path in paths if path.exists() for line in path.read_text().splitlines()]
    lines = [json.loads(line) for line in written if line.endswith("}")]
    passed = dict.fromkeys(stems, 0)
    failed: dict[str, list[str]] = {operator: [] for operator in stems}
    for line in lines:
        test = line["test"]
        named = [operator for operator, stem in stems.items() if operator in test or f"test_{stem}" in test]
        for operator in named or ("test_ops" in test and stems) or ():
            passed[operator] += line["outcome"] == "passed"
            failed[operator] += [test] * (line["outcome"] == "failed")
    reasons: dict[str, int] = {}
    for line in lines:
        if line["outcome"] == "skipped":
            reasons[line["message"]] = reasons.get(line["message"], 0) + 1
    return {
        "passed": sum(line["outcome"] == "passed" for line in lines),
        "failed": [{"test": x["test"], "message": x["message"]} for x in lines if x["outcome"] == "failed"],
        "skipped": reasons,
        "operators": {operator: _verdict(passed[operator], failed[operator]) for operator in stems},
    }


def _verdict(passed: int, failed: list[str]) -> Row:
    """Green: tests ran, and none failed."""
    reason = f"{passed} tests pass" if passed else "it has no tests"
    if failed:
        reason = f"{len(failed)} of {passed + len(failed)} tests fail, first {failed[0]}"
    return {"passed": passed, "failed": len(failed), "green": passed > 0 and not failed, "reason": reason}


def files_for(operators: Sequence[str], stems: Mapping[str, str], folder: Path = ROOT / "tests") -> list[str]:
    """``test_ops*.py``, which hold what all operators have in common, and ``test_<stem>*.py``."""
    patterns = ["test_ops*.py", *(f"test_{stems[operator]}*.py" for operator in operators)]
    return [str(file) for pattern in patterns for file in sorted(folder.rglob(pattern))]


def command(files: Sequence[str], *options: str) -> list[str]:
    """Runs tests and writes their outcomes."""
    plugins = ["-p", "no:cacheprovider", "-p", "bench.pytest_outcomes"]
    return [sys.executable, "-W", "ignore::RuntimeWarning", "-m", "pytest", "-q", *plugins, *options, *files]


def environment(path: Path) -> dict[str, str]:
    """What the command needs beside: the outcomes' file, and where the plugin is."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {FILE: str(path), "PYTHONPATH": paths}


def run_tests(operators: Sequence[str], stems: Mapping[str, str]) -> Row:
    """The operators' tests, in a process of their own; :func:`summarize` of what they said."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "outcomes.jsonl")
        files = files_for(operators, stems)
        if files:
            run = command(files, "--no-header", *NOT_ON_A_CPU)
            done = subprocess.run(run, cwd=ROOT, env=os.environ | environment(path), capture_output=True, text=True)
            if done.returncode > 1:  # pytest could not run them
                problem = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no word"]
                path.write_text(json.dumps({"test": "test_ops", "outcome": "failed", "message": problem[0]}) + "\n")
        return summarize([path], {operator: stems[operator] for operator in operators})
