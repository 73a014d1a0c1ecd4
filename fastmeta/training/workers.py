"""Runs many runs in a few processes. What a run computes does not depend on how many there are."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastmeta.training.config import RunConfig
from fastmeta.training.side_by_side import Caller, side_by_side
from fastmeta.training.train import train

_PROGRESS_EVERY = 5  # steps


@dataclass(frozen=True)
class Job:
    """A run and its folder."""

    config: RunConfig
    folder: Path

    def __str__(self) -> str:
        """For an error."""
        return f"{self.config.arm}, seed {self.config.seed}"


def run_jobs(
    jobs: Sequence[Job],
    *,
    workers: int,
    on_step: Callable[[Job, int], None],
    on_finish: Callable[[], None],
    should_stop: Callable[[], bool],
) -> None:
    """Train every job, in order, ``workers`` at a time.

    Args:
        jobs: the runs.
        workers: processes; 1 trains in this one.
        on_step: called with a job and the steps it has finished.
        on_finish: called when a job's results are written.
        should_stop: when true, running jobs checkpoint and the call returns.

    Raises:
        WorkerError: a run failed in another process, or the process died; the others are stopped at a checkpoint.
    """
    if min(workers, len(jobs)) > 1:
        calls = side_by_side(
            _train, jobs, min(workers, len(jobs)), on_message=on_step, should_stop=should_stop, patient=True
        )
        with contextlib.closing(calls):
            for _, is_finished in calls:
                if is_finished:
                    on_finish()
        return
    for job in jobs:
        if should_stop():
            return

        def report(step: int, job: Job = job) -> None:
            on_step(job, step)

        if train(job.config, job.folder, on_step=report, should_stop=should_stop) is not None:
            on_finish()


def _train(job: Job, caller: Caller) -> bool:
    """Whether the run is finished. One whose caller is gone stops at a checkpoint."""

    def report(step: int) -> None:
        if step % _PROGRESS_EVERY == 0 or step == job.config.steps:
            caller.tell(step)

    return train(job.config, job.folder, on_step=report, should_stop=caller.is_gone) is not None
