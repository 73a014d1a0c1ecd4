"""No figures for an operator whose tests fail."""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bench.environment import ROOT


@dataclass(frozen=True)
class Verdict:
    """What the tests said of one operator."""

    passed: int
    failed: tuple[str, ...]

    @property
    def green(self) -> bool:
        """Tests ran, and none failed."""
        return self.passed > 0 and not self.failed

    @property
    def reason(self) -> str:
        if self.failed:
            return f"{len(self.failed)} of {self.passed + len(self.failed)} tests fail, first {self.failed[0]}"
        return f"{self.passed} tests pass" if self.passed else "it has no tests"

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"green": self.green, "reason": self.reason}


def judge(report: Path, operators: Sequence[str], stems: dict[str, str]) -> dict[str, Verdict]:
    """Reads pytest's JUnit report.

    A test belongs to the operators named in its id, by the operator's name or its file's; one that names none of them
    belongs to all. ``stems`` holds every operator there is, ``operators`` those that are asked for.
    """
    passed = dict.fromkeys(operators, 0)
    failed: dict[str, list[str]] = {operator: [] for operator in operators}
    for test in ElementTree.parse(report).getroot().iter("testcase"):
        name = "::".join(part for part in (test.get("classname"), test.get("name")) if part)
        outcomes = {child.tag for child in test}
        if "skipped" in outcomes:
            continue
        named = [operator for operator, stem in stems.items() if operator in name or f"test_{stem}" in name]
        for operator in operators:
            if named and operator not in named:
                continue
            if outcomes & {"failure", "error"}:
                failed[operator].append(name)
            else:
                passed[operator] += 1
    return {operator: Verdict(passed[operator], tuple(failed[operator])) for operator in operators}


def files_for(operators: Sequence[str], stems: dict[str, str], folder: Path = ROOT / "tests") -> list[str]:
    """``test_ops*.py``, which hold what all operators have in common, and ``test_<stem>*.py``."""
    patterns = ["test_ops*.py", *(f"test_{stems[operator]}*.py" for operator in operators)]
    return [str(file) for pattern in patterns for file in sorted(folder.glob(pattern))]


def run_tests(operators: Sequence[str], stems: dict[str, str]) -> dict[str, Verdict]:
    """Runs the operators' tests in a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--no-header",
            "-p",
            "no:cacheprovider",
            "-k",
            "not triton and not cuda",  # kernels in an interpreter and an emulator: slow, and not measured here
            f"--junitxml={report}",
        ]
        files = files_for(operators, stems)
        if not files:
            return dict.fromkeys(operators, Verdict(0, ()))
        done = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True, check=False)
        if not report.exists():
            problem = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["pytest wrote no report"]
            return dict.fromkeys(operators, Verdict(0, (f"pytest itself: {problem[0]}",)))
        return judge(report, operators, stems)
