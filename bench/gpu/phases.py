"""Phases in processes of their own: one that fails or hangs is recorded, and the others go on."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["passed", "failed", "timed out", "skipped"]
TAIL = 4_000  # characters of the output that go into the record
_POLL_S = 0.1


@dataclass(frozen=True)
class Phase:
    """A command and how long it may take.

    Args:
        name: what the report calls it.
        command: program and arguments; run again as it is after a crash, so it must go on where it was.
        seconds: limit for all attempts together.
        attempts: how often it is started at most; more than one only for a command that writes ``progress``.
        progress: a file the command rewrites all the time.
        stall_s: without a change of ``progress`` for so long, the process hangs and is ended.
        environment: added to this process's own.
        log: where its output goes.
    """

    name: str
    command: Sequence[str]
    seconds: float
    log: Path
    attempts: int = 1
    progress: Path | None = None
    stall_s: float = 120.0
    environment: Mapping[str, str] = field(default_factory=dict)


class _Running:
    """One phase under way."""

    def __init__(self, phase: Phase, cwd: Path) -> None:
        self.phase, self.cwd = phase, cwd
        self.begin, self.seconds, self.starts = time.monotonic(), 0.0, 0
        self.ends: list[str] = []  # how earlier attempts ended
        self.status: Status | None = None
        self.reason = ""
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
        if self.status is not None or self.process is None:
            return
        code = self.process.poll()
        if code is None:
            if time.monotonic() - self.begin > self.phase.seconds:
                self.stop()
                self._finish("timed out", f"ended after {self.phase.seconds:.0f} s")
            elif self._stalled():
                self.stop()
                self._again(f"no progress for {self.phase.stall_s:.0f} s")
        elif code == 0:
            self._finish("passed", "" if not self.ends else f"started again after: {'; '.join(self.ends)}")
        else:
            self.stop()  # whatever it left behind
            self._again(f"exit status {code}" if code > 0 else f"ended by signal {-code}")

    def _stalled(self) -> bool:
        progress = self.phase.progress
        if progress is None:
            return False
        try:
            last = max(progress.stat().st_mtime, self.attempt_begin)
        except OSError:
            last = self.attempt_begin
        return time.time() - last > self.phase.stall_s

    def _again(self, end: str) -> None:
        self.ends.append(end)
        if len(self.ends) < self.phase.attempts:
            self._start()
        else:
            self._finish("failed", "; ".join(self.ends))

    def _finish(self, status: Status, reason: str) -> None:
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

    Args:
        phases: what to run.
        cwd: where.
        refresh: called from time to time meanwhile.
        every_s: and how often.
    """
    running = [_Running(phase, cwd) for phase in phases]
    refreshed = time.monotonic()
    try:
        while any(one.status is None for one in running):
            for one in running:
                one.poll()
            time.sleep(_POLL_S)
            if time.monotonic() - refreshed > every_s:
                refresh()
                refreshed = time.monotonic()
    finally:
        for one in running:
            if one.status is None:
                one.stop()
    return {one.phase.name: one.record() for one in running}


def skipped(reason: str) -> dict[str, Any]:
    """The record of a phase that did not run."""
    return {"status": "skipped", "reason": reason, "seconds": 0.0, "limit_s": 0.0, "tail": ""}
