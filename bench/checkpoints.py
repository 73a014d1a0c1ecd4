"""What a checkpoint costs, and how many hours a run loses to failures with it.

Saves model, average of weights and momentum (three float32 numbers a parameter) as a run does, flushed to the disk,
and reads one back; of several saves the fastest counts. From the seconds C of a save and R of a restart follows, for
failures at exponential intervals with the mean M, the wall time of a run of T seconds that saves every t (Daly 2006):

  M exp(R / M) (exp((t + C) / M) - 1) T / t

What it exceeds T by is lost. It is least near t = sqrt(2 C M) (Young 1974). Writes checkpoints.json and checkpoints.md.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import environment, files, text
from bench.operators import RESULTS
from fastmeta.training.checkpoints import Checkpoints

SCHEMA_VERSION = 1
# Millions of parameters and seconds of a step: WRN-28-2, ResNet-50, ViT-L on one GPU each, in round numbers.
RUNS = ((1.5, 0.02), (25.0, 0.25), (300.0, 1.0))
STEPS = 100_000
DAY = 86_400.0
START = 60.0  # s, assumed: to be scheduled, import torch and open the data, before the checkpoint is read
TENSORS = 100  # of each kind
INTERVALS = (100, 1_000, 10_000)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, help="where to save: on the disk that runs use (the temporary folder)")
    parser.add_argument("--largest", type=float, default=300.0, help="millions of parameters (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="saves of each size (%(default)s)")
    parser.add_argument("--out", type=Path, help="folder for the results (bench/results/<processor and threads>)")


def run(options: argparse.Namespace) -> int:
    results: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "environment": environment.describe(),
        "assumed": {"mean_seconds_between_failures": DAY, "start_seconds": START, "steps": STEPS},
        "runs": [],
    }
    for millions, step_seconds in RUNS:
        if millions <= options.largest:
            saved = measure(int(1e6 * millions), options.rounds, options.folder)
            results["runs"].append({"step_seconds": step_seconds, **saved, **losses(saved, step_seconds)})
    folder = options.out or RESULTS / environment.machine_name()
    files.write(folder / "checkpoints.json", results)
    report = "\n".join(text.table_of(rows(results)))
    (folder / "checkpoints.md").write_text(report)
    print(f"{report}\nin {folder}")
    return 0


def measure(parameters: int, rounds: int, folder: Path | None) -> dict[str, Any]:
    """Seconds of a save and of reading it back, and bytes.

    The fastest save: whatever else the machine does makes one slower, never faster. The first one, which is also read
    back, does not count.
    """
    size = max(1, parameters // TENSORS)
    state = {
        kind: {str(number): torch.randn(size) for number in range(TENSORS)} for kind in ("model", "average", "momentum")
    }
    with tempfile.TemporaryDirectory(dir=folder) as name:
        checkpoints = Checkpoints(name, keep=1)
        saves = [_seconds(partial(checkpoints.save, step, state)) for step in range(rounds + 1)]
        read = _seconds(checkpoints.latest)
        file = max(Path(name).iterdir())
        return {
            "parameters": TENSORS * size,
            "bytes": file.stat().st_size,
            "save_seconds": min(saves[1:]),
            "longest_save_seconds": max(saves[1:]),
            "read_seconds": read,
        }


def _seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def losses(saved: dict[str, Any], step_seconds: float) -> dict[str, Any]:
    """Hours lost of a run of :data:`STEPS` steps, by the number of steps between saves; the best such number."""
    save, restart = saved["save_seconds"], START + saved["read_seconds"]
    length = STEPS * step_seconds

    def lost(steps: float) -> float:
        return (wall_seconds(length, steps * step_seconds, save, restart) - length) / 3600

    best = math.sqrt(2 * save * DAY) / step_seconds
    return {
        "best_interval_steps": best,
        "hours": length / 3600,
        "hours_lost_at_best": lost(min(best, STEPS)),
        "hours_lost": {str(steps): lost(steps) for steps in INTERVALS},
        "hours_lost_without": (wall_seconds(length, length, 0.0, START) - length) / 3600,
    }


def wall_seconds(length: float, interval: float, save: float, restart: float, between_failures: float = DAY) -> float:
    """Expected wall time of a run, by the equation above.

    >>> round(wall_seconds(DAY, 3_600, 0, 0) - DAY)  # a failure a day, and half an hour's work lost with it
    1825
    """
    mean = between_failures
    return mean * math.exp(restart / mean) * math.expm1((interval + save) / mean) * length / interval


def rows(results: dict[str, Any]) -> list[dict[str, str]]:
    """The table of the report."""
    return [
        {
            "parameters": f"{row['parameters'] / 1e6:.3g}M",
            "file": text.memory(row["bytes"]),
            "save": text.time(1e6 * row["save_seconds"]),
            "read": text.time(1e6 * row["read_seconds"]),
            "step": text.time(1e6 * row["step_seconds"]),
            "1e5 steps": _duration(row["hours"]),
            "best interval": f"{_two_digits(row['best_interval_steps']):,} steps",
            "lost then": _duration(row["hours_lost_at_best"]),
            **{f"every {int(steps):,}": _duration(lost) for steps, lost in row["hours_lost"].items()},
            "no checkpoint": _duration(row["hours_lost_without"]),
        }
        for row in results["runs"]
    ]


def _two_digits(value: float) -> int:
    return int(float(f"{value:.2g}"))


def _duration(hours: float) -> str:
    for unit, size in (("h", 1.0), ("min", 60.0)):
        if hours * size >= 1:
            return f"{hours * size:.2g} {unit}"
    return f"{3600 * hours:.2g} s"
