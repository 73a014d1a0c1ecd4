"""What a measuring process has done, on disk at once: one that is started again goes on from there."""

import os
from pathlib import Path
from typing import Any

from bench import files


class Progress:
    """The results so far, on disk, and beside them what is running."""

    def __init__(self, path: Path) -> None:
        self.path, self.running = path, files.running(path)
        before = files.read(path) or {}
        self.cases: list[dict[str, Any]] = before.get("cases", [])
        self.crashed: dict[str, dict[str, str]] = before.get("crashed", {})
        self.shared: dict[str, Any] = before.get("shared", {})
        self.unfinished: list[str] = []
        died_in = files.read(self.running)
        if died_in:
            end = os.environ.get("FASTMETA_BENCH_PREVIOUS_END", "ended")
            self.crashed.setdefault(died_in[0], {})[died_in[1]] = f"the process died in it: {end}"

    def announce(self, key: str, step: str) -> None:
        files.write(self.running, [key, step])

    def finish(self, record: dict[str, Any]) -> None:
        self.cases.append(record)
        self.save()

    def end(self, unfinished: list[str]) -> None:
        self.unfinished = unfinished
        self.save()

    def save(self) -> None:
        content = {
            "shared": self.shared,
            "cases": self.cases,
            "crashed": self.crashed,
            "unfinished": self.unfinished,
        }
        files.write(self.path, content)
        files.write(self.running, None)
