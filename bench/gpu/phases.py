"""Phases in processes of their own: one that fails or hangs is recorded, and the others go on."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TAIL = 4_000  # characters of the output that go into the record
_POLL_S = 0.1


@dataclass(frozen=True)
class Phase:
    """A command and how long it may take."""

    name: str
    command: Sequence[str]  # restarted unchanged after a crash, so it has to resume by itself
    seconds: float  # limit for all attempts together
    log: Path  # where its output goes
    attempts: int = 1  # starts at most; more than one only for a command that writes `progress`
    progress: Path | None = None  # a file the command rewrites all the time
    stall_s: float = 120.0  # without a change of `progress` for so long, the process hangs and is ended
    environment: Mapping[str, str] = field(default_factory=dict)  # added to this process's own


class _Running:
    """One phase under way."""

    def __init__(self, phase: Phase, cwd: Path) -> None:
        self.phase, self.cwd = phase, cwd
        self.begin, self.seconds, self.starts = time.monotonic(), 0.0, 0
        self.ends: list[str] = []  # how earlier attempts ended
        self.status, self.reason = "", ""
        phase.log.parent.mkdir(parents=True, exist_ok=True)
        phase.log.write_bytes(b"")
        self._start()

    def _start(self) -> None:
        self.attempt_begin = time.time()
        self.starts += 1
        previous = {"FASTMETA_BENCH_PREVIOUS_END": self.ends[-1]} if self.ends else {}
        self.process: subprocess.Popen[bytes] | None = None
        try:
            with self.phase.log.open("ab") as log:
                self.process = subprocess.Popen(
                    list(self.phase.command),
                    cwd=self.cwd,
                    env=os.environ | {"PYTHONUNBUFFERED": "1"} | dict(self.phase.environment) | previous,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # so that its children end with it
                )
        except OSError as error:
            self._finish("failed", str(error))

    def poll(self) -> None:
        """Look once; ends or restarts the process where that is due."""
        if self.status or self.process is None:
            return
        code = self.process.poll()
        if code == 0:
            self._finish("passed", "" if not self.ends else f"started again after: {'; '.join(self.ends)}")
        elif code is not None:
            self._again(f"exit status {code}" if code > 0 else f"ended by signal {-code}")
        elif time.monotonic() - self.begin > self.phase.seconds:
            self.stop()
            self._finish("timed out", f"ended after {self.phase.seconds:.0f} s")
        elif self._stalled():
            self._again(f"no progress for {self.phase.stall_s:.0f} s")

    def _stalled(self) -> bool:
        if self.phase.progress is None:
            return False
        last = self.attempt_begin
        with contextlib.suppress(OSError):
            last = max(last, self.phase.progress.stat().st_mtime)
        return time.time() - last > self.phase.stall_s

    def _again(self, end: str) -> None:
        self.stop()  # the process, or whatever it left behind
        self.ends.append(end)
        if len(self.ends) < self.phase.attempts:
            self._start()
        else:
            self._finish("failed", "; ".join(self.ends))

    def _finish(self, status: str, reason: str) -> None:
        self.status, self.reason = status, reason
        self.seconds = time.monotonic() - self.begin

    def stop(self) -> None:
        """End the process and its children."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def record(self) -> dict[str, Any]:
        text = self.phase.log.read_text(errors="replace")
        return {
            "status": self.status,
            "reason": self.reason,
            "seconds": self.seconds,
            "limit_s": self.phase.seconds,
            "starts": self.starts,
            "command": list(self.phase.command),
            "tail": "" if self.status == "passed" else text[-TAIL:],
        }


def run_together(
    phases: Sequence[Phase], cwd: Path, refresh: Callable[[], None] = lambda: None, every_s: float = 20.0
) -> dict[str, dict[str, Any]]:
    """Run phases beside each other until the last one ends; returns each one's record.

    Meanwhile ``refresh`` is called every so many seconds.
    """
    running = [_Running(phase, cwd) for phase in phases]
    refreshed = time.monotonic()
    try:
        while not all(one.status for one in running):
            for one in running:
                one.poll()
            time.sleep(_POLL_S)
            if time.monotonic() - refreshed > every_s:
                refresh()
                refreshed = time.monotonic()
    finally:
        for one in running:
            if not one.status:
                one.stop()
    return {one.phase.name: one.record() for one in running}


def not_run(status: str, reason: str) -> dict[str, Any]:
    """The record of a phase that did not run."""
    return {"status": status, "reason": reason, "seconds": 0.0, "limit_s": 0.0, "tail": ""}
