"""What the tests said on the device, from the lines that ``bench.gpu.pytest_outcomes`` writes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "FASTMETA_BENCH_OUTCOMES"


def summarize(path: Path, stems: Mapping[str, str]) -> dict[str, Any]:
    """Counts, failures and reasons for skips; and for each operator how many of the tests that name it passed.

    Args:
        path: the plugin's file.
        stems: the stem of each operator's test files.
    """
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    except OSError:
        lines = []
    found: dict[str, list[Any]] = {"passed": [], "failed": [], "skipped": []}
    for line in lines:
        found[line["outcome"]].append(line)
    by_operator = {}
    for operator, stem in stems.items():
        named = [line for line in lines if operator in line["test"] or f"test_{stem}" in line["test"]]
        outcomes = [line["outcome"] for line in named]
        by_operator[operator] = {"passed": outcomes.count("passed"), "failed": outcomes.count("failed")}
    reasons: dict[str, int] = {}
    for line in found["skipped"]:
        reasons[line["message"]] = reasons.get(line["message"], 0) + 1
    return {
        "passed": len(found["passed"]),
        "failed": [{"test": line["test"], "message": line["message"]} for line in found["failed"]],
        "skipped": reasons,
        "operators": by_operator,
    }
