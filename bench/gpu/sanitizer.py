"""The phases ``memcheck`` and ``racecheck``: NVIDIA's compute-sanitizer over one small pass of every kernel."""

import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TOOLS = ("memcheck", "racecheck")
BEGUN, DONE = "The pass begins.", "The pass is done."
# "ERROR SUMMARY: 0 errors"; "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)". One for each process.
_SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard).*")


def find() -> str | None:
    """The program, on the path or with the CUDA toolkit."""
    on_path = shutil.which("compute-sanitizer")
    if on_path:
        return on_path
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [Path(home, *rest) for home in homes if home for rest in (("bin",), ("compute-sanitizer",))]
    return next((str(place / "compute-sanitizer") for place in places if (place / "compute-sanitizer").is_file()), None)


def is_wrapper(program: str) -> bool:
    """Whether the interpreter is a script that starts the real one, which the tool then has to follow."""
    try:
        return Path(program).resolve().read_bytes()[:4] != b"\x7fELF"
    except OSError:
        return True


def command(program: str, tool: str) -> list[str]:
    """Without its limit on the time to the first launch: importing torch under the tool takes longer."""
    followed = "all" if is_wrapper(sys.executable) else "application-only"  # not the compilers it starts
    options = ["--tool", tool, "--launch-timeout", "0", "--target-processes", followed]
    return [program, *options, sys.executable, "-m", "bench.gpu.small_pass"]


def judged(record: Mapping[str, Any], output: str) -> dict[str, Any]:
    """The phase's record with the tool's own verdict; a tool that refuses this machine is a skip."""
    lines = [line.lstrip("= ").strip() for line in output.splitlines() if line.strip()]
    summaries = [found for line in lines if (found := _SUMMARY.search(line))]
    worst = max(summaries, key=lambda found: int(found[1] or found[2]), default=None)
    judgement = dict(record)
    if BEGUN not in output and record["status"] != "timed out" and "Traceback" not in output:
        errors = [line for line in lines if "error" in line.lower() or "not supported" in line.lower()]
        refusal = (errors or lines or ["no output"])[0]
        return judgement | {"status": "skipped", "reason": f"compute-sanitizer did not run here: {refusal}"}
    if worst is not None and DONE in output:  # what the tool says, whatever the exit status
        count = int(worst[1] or worst[2])
        tail = output[-4000:] if count else ""
        return judgement | {"status": "failed" if count else "passed", "reason": worst[0], "tail": tail}
    said = worst[0] if worst else "the tool gave no summary"
    if record["status"] == "passed":
        return judgement | {"status": "failed", "reason": f"{said}; the pass did not end", "tail": output[-4000:]}
    return judgement | {"reason": f"{record['reason']}; {said}"}
