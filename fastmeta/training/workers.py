"""Runs many runs in a few processes. What a run computes does not depend on how many there are."""

import multiprocessing
import os
import queue
import signal
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmeta.training.config import RunConfig
from fastmeta.training.train import train

_PROGRESS_EVERY = 5  # steps


class WorkerError(RuntimeError):
    """A run failed in a worker process."""


@dataclass(frozen=True)
class Job:
    """A run and its folder."""

    config: RunConfig
    folder: Path


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(
    jobs: Sequence[Job],
    *,
    workers: int,
    on_step: Callable[[int, int], None],
    on_finish: Callable[[int], None],
    should_stop: Callable[[], bool],
) -> None:
    """Train every job, in order, ``workers`` at a time.

    Args:
        jobs: the runs.
        workers: processes; 1 trains in this one.
        on_step: called with a job's number and the steps it has finished.
        on_finish: called with a job's number when its results are written.
        should_stop: when true, running jobs checkpoint and the call returns.

    Raises:
        WorkerError: a run failed; the others are stopped at a checkpoint.
    """
    if min(workers, len(jobs)) <= 1:
        for number, job in enumerate(jobs):
            if should_stop():
                return

            def report(step: int, number: int = number) -> None:
                on_step(number, step)

            if train(job.config, job.folder, on_step=report, should_stop=should_stop) is not None:
                on_finish(number)
        return
    # Not fork: a forked child would inherit torch's threads in an undefined state.
    context = multiprocessing.get_context("spawn")
    todo, messages, stop = context.Queue(), context.Queue(), context.Event()
    for number, job in enumerate(jobs):
        todo.put((number, job))
    count = min(workers, len(jobs))
    for _ in range(count):
        todo.put(None)
    processes = [context.Process(target=_work, args=(todo, messages, stop), daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        _listen(processes, messages, stop, on_step, on_finish, should_stop)
    finally:
        stop.set()
        for process in processes:
            process.join()


def _listen(
    processes: Sequence[Any],
    messages: Any,
    stop: Any,
    on_step: Callable[[int, int], None],
    on_finish: Callable[[int], None],
    should_stop: Callable[[], bool],
) -> None:
    leaving = 0
    while leaving < len(processes):
        if should_stop():
            stop.set()
        try:
            kind, number, value = messages.get(timeout=0.2)
        except queue.Empty:
            dead = [process for process in processes if process.exitcode not in (None, 0)]
            if dead:
                raise WorkerError(f"a worker process died with exit code {dead[0].exitcode}") from None
            continue
        if kind == "step":
            on_step(number, value)
        elif kind == "finish":
            on_finish(number)
        elif kind == "leave":
            leaving += 1
        else:
            raise WorkerError(value)


def _work(todo: Any, messages: Any, stop: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    while not stop.is_set():
        item = todo.get()
        if item is None:
            break
        number, job = item

        def report(step: int, number: int = number, last: int | None = job.config.steps) -> None:
            if step % _PROGRESS_EVERY == 0 or step == last:
                messages.put(("step", number, step))

        try:
            if train(job.config, job.folder, on_step=report, should_stop=stop.is_set) is not None:
                messages.put(("finish", number, None))
        except Exception:
            messages.put(("error", number, f"{job.config.arm}, seed {job.config.seed}:\n{traceback.format_exc()}"))
            return
    todo.cancel_join_thread()
    messages.put(("leave", -1, None))
