"""A pytest plugin that writes each test's outcome as it comes.

``pytest -p bench.pytest_outcomes``, the file's name in ``FASTMETA_BENCH_OUTCOMES``. A session that is ended leaves
all that it had; a process whose CUDA context is broken ends itself, because every later test would fail for it.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from bench.gate import FILE

_LOST = re.compile(
    r"CUDA_ERROR_ILLEGAL|(CUDA error|Triton Error \[CUDA\]): (an illegal|misaligned|unspecified|device-side assert)"
)
_MOST = 400  # characters of a failure


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_EndWhenLost())
    if not hasattr(config, "workerinput"):  # a process of pytest-xdist reports to the one that writes
        config.pluginmanager.register(_Writer(Path(os.environ[FILE])))


class _Writer:
    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lines = path.open("w", buffering=1)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._write(report.nodeid, report.outcome, report.longrepr)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(report.nodeid, "failed", report.longrepr)

    def _write(self, test: str, outcome: str, problem: Any) -> None:
        line = {"test": test, "outcome": outcome}
        if outcome != "passed":
            line["message"] = _message(problem)
        self.lines.write(json.dumps(line) + "\n")


class _EndWhenLost:
    @pytest.hookimpl(trylast=True)  # the report is on its way when this runs
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and _LOST.search(str(report.longrepr)):
            os._exit(3)


def _message(problem: Any) -> str:
    if isinstance(problem, tuple):  # a skip: file, line, reason
        return str(problem[2])[:_MOST]
    crash = getattr(problem, "reprcrash", None)
    return str(problem if crash is None else crash.message)[:_MOST]
