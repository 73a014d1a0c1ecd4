"""Results on disk, whole at any time."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any


def write(path: Path, value: Any) -> None:
    """As JSON, so that a process ended in the middle leaves the file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(_plain(value), indent=1) + "\n")
    partial.replace(path)


def _plain(value: Any) -> Any:
    """JSON has no word for NaN and infinity."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read(path: Path) -> Any:
    """What is there; None if there is nothing that can be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def folder_name(name: str) -> str:
    """A machine's name as a folder's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


class Progress:
    """Results of a measuring process, on disk as they come, and what it runs now: started again, it goes on there."""

    def __init__(self, path: Path) -> None:
        self.path, self.running = path, running(path)
        before = read(path) or {}
        self.cases: list[dict[str, Any]] = before.get("cases", [])
        self.crashed: dict[str, dict[str, str]] = before.get("crashed", {})
        self.shared: dict[str, Any] = before.get("shared", {})
        self.unfinished: list[str] = []
        died_in = read(self.running)
        if died_in:
            end = os.environ.get("FASTMETA_BENCH_PREVIOUS_END", "ended")
            self.crashed.setdefault(died_in[0], {})[died_in[1]] = f"the process died in it: {end}"

    def announce(self, key: str, step: str) -> None:
        write(self.running, [key, step])

    def finish(self, record: dict[str, Any]) -> None:
        self.cases.append(record)
        self.save()

    def save(self) -> None:
        names = ("shared", "cases", "crashed", "unfinished")
        write(self.path, {name: getattr(self, name) for name in names})
        write(self.running, None)


def running(path: Path) -> Path:
    """The file that changes all the time while a process measures into ``path``."""
    return path.with_suffix(".running.json")
