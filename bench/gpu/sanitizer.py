"""The phases ``memcheck`` and ``racecheck``: NVIDIA's compute-sanitizer over one small pass of every kernel."""

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TOOLS = ("memcheck", "racecheck")
BEGUN, DONE = "The pass begins.", "The pass is done."
_SUMMARY = "ERROR SUMMARY:"
_FOUND = 9  # exit status with errors found


def find() -> str | None:
    """The program, on the path or with the CUDA toolkit."""
    on_path = shutil.which("compute-sanitizer")
    if on_path:
        return on_path
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [Path(home, *rest) for home in homes if home for rest in (("bin",), ("compute-sanitizer",))]
    return next((str(place / "compute-sanitizer") for place in places if (place / "compute-sanitizer").is_file()), None)


def command(program: str, tool: str) -> list[str]:
    return [
        program,
        "--tool",
        tool,
        "--target-processes",
        "application-only",  # not the compilers it starts
        "--error-exitcode",
        str(_FOUND),
        sys.executable,
        "-m",
        "bench.gpu.small_pass",
    ]


def judged(record: Mapping[str, Any], output: str) -> dict[str, Any]:
    """The phase's record with the tool's own verdict; a tool that refuses this machine is a skip."""
    lines = [line.lstrip("= ").strip() for line in output.splitlines() if line.strip()]
    summary = next((line[line.index(_SUMMARY) :] for line in reversed(lines) if _SUMMARY in line), None)
    # "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
    summary = summary or next((line for line in reversed(lines) if "RACECHECK SUMMARY:" in line), None)
    judgement = dict(record)
    if BEGUN not in output and record["status"] != "timed out" and "Traceback" not in output:
        errors = [line for line in lines if "error" in line.lower() or "not supported" in line.lower()]
        refusal = (errors or lines or ["no output"])[0]
        return judgement | {"status": "skipped", "reason": f"compute-sanitizer did not run here: {refusal}"}
    if record["status"] == "passed" and DONE in output and summary is not None:
        return judgement | {"reason": summary}
    if record["status"] == "passed":
        return judgement | {"status": "failed", "reason": summary or "the tool gave no summary", "tail": output[-4000:]}
    return judgement | {"reason": f"{record['reason']}; {summary or 'no summary'}"}
