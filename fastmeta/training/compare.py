"""The main job: bases and methods on the same seeds, and what the difference is."""

import contextlib
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tqdm import tqdm

from fastmeta.data import Images
from fastmeta.ssl import BASES
from fastmeta.training.build import load_images, record_of, resolve, split_of
from fastmeta.training.config import RunConfig
from fastmeta.training.files import make_folder, read_json, read_jsonl, write_json, write_jsonl
from fastmeta.training.recipes import METHODS, base_of
from fastmeta.training.reference import support_vector_error
from fastmeta.training.reports.summary import summarize, table
from fastmeta.training.side_by_side import available_cores
from fastmeta.training.signals import stop_requested
from fastmeta.training.timing import interleaved_seconds
from fastmeta.training.train import check_folder
from fastmeta.training.workers import Job, run_jobs

_HARD = ("pseudo-label", "fixmatch", "flexmatch", "freematch")  # bases that make labels one-hot
_TIMED_STEPS = 40  # of each arm


@dataclass(frozen=True)
class CompareConfig:
    """Which runs to compare.

    Args:
        runs: every run, in the order they are trained.
        out: folder of the whole comparison.
        workers: processes; None: one per available core.
    """

    runs: Sequence[RunConfig]
    out: Path
    workers: int | None = None


def grid(bases: Sequence[str], methods: Sequence[str], seeds: Sequence[int], **settings: Any) -> list[RunConfig]:
    """Every base with every method that it can use, one seed after the other, so that what is finished is paired.

    Raises:
        ValueError: a setting is out of range.

    >>> [run.arm for run in grid(["supervised", "fixmatch"], ["none", "l2i"], [0])]
    ['supervised', 'fixmatch', 'fixmatch + l2i']
    """
    return [
        RunConfig(base=base, method=method, seed=seed, **settings)
        for seed in seeds
        for base in bases
        for method in methods
        if method == "none" or base not in BASES or BASES[base].imputes
    ]


def compare(config: CompareConfig, *, quiet: bool = False) -> dict[str, Any]:
    """Train what is not trained yet, and write config.json, metrics.jsonl, results.json and the plots.

    Ctrl-C and SIGTERM checkpoint the running runs and report the finished ones; the same call continues.

    Args:
        config: the runs.
        quiet: print nothing.

    Returns:
        What results.json holds.

    Raises:
        ConfigMismatch: a run's folder holds other settings.
        ValueError: a class has fewer images than labels are asked for, or nothing can be written to the folder.
        WorkerError: a run failed.
    """
    images = load_images(config.runs[0])
    config = replace(config, runs=[resolve(run, images) for run in config.runs])
    jobs = [Job(run, run_folder(config.out, run)) for run in config.runs]
    for job in jobs:
        check_folder(record_of(job.config, images), job.folder)
    make_folder(config.out)
    workers = config.workers if config.workers is not None else available_cores()
    write_json(config.out / "config.json", {"runs": [run.as_dict() for run in config.runs]})
    pending = [job for job in jobs if not (job.folder / "results.json").exists()]
    if not quiet:
        done = len(jobs) - len(pending)
        print(f"{len(jobs)} runs, {done} of them finished before, in {config.out} ({workers} at a time)", flush=True)

    def on_finish() -> None:
        _write(config, _results(jobs))

    stopped = False
    if pending:
        with stop_requested() as should_stop, _Progress(pending, quiet) as progress:
            run_jobs(pending, workers=workers, on_step=progress.update, on_finish=on_finish, should_stop=should_stop)
            stopped = should_stop()
    step_seconds = {} if stopped else _step_seconds(config, jobs, images, changed=bool(pending))
    results = _results(jobs, step_seconds)
    results["support_vector_test_error"] = _support_vector_errors(config, images)
    _write(config, results)
    if not quiet:
        _report(config, results, stopped)
    return results


def run_folder(out: Path, run: RunConfig) -> Path:
    """Where one run of a comparison lives."""
    return out / "runs" / run.base / run.method / f"seed-{run.seed}"


def _results(jobs: Sequence[Job], step_seconds: Mapping[str, float] = MappingProxyType({})) -> dict[str, Any]:
    finished = [result for job in jobs if (result := _result(job.folder)) is not None]
    return {
        "finished": len(finished),
        "planned": len(jobs),
        "table": summarize(finished, step_seconds),
        "step_seconds": dict(step_seconds),
        "runs": finished,
    }


def _result(folder: Path) -> dict[str, Any] | None:
    """A finished run's figures and its time, which is not among them: a run started twice has the same figures."""
    result = read_json(folder / "results.json")
    seconds = [row["seconds_per_step"] for row in read_jsonl(folder / "timing.jsonl")]
    return result and {**result, "seconds_per_step": statistics.median(seconds) if seconds else None}


def _write(config: CompareConfig, results: dict[str, Any]) -> None:
    write_json(config.out / "results.json", results)
    folders = [run_folder(config.out, run) for run in config.runs]
    write_jsonl(
        config.out / "metrics.jsonl", (row for folder in folders for row in read_jsonl(folder / "metrics.jsonl"))
    )


def _step_seconds(config: CompareConfig, jobs: Sequence[Job], images: Images, *, changed: bool) -> dict[str, float]:
    """Seconds per step by arm; read from the results of an earlier call if nothing was trained since."""
    arms: dict[str, Job] = {}
    for job in jobs:
        arms.setdefault(job.config.arm, job)
    earlier = (read_json(config.out / "results.json") or {}).get("step_seconds", {})
    if not changed and set(earlier) == set(arms):
        return earlier
    rounds = min(job.config.steps or _TIMED_STEPS for job in jobs)  # of a short run no more than it has
    found = interleaved_seconds(list(arms.values()), images, rounds=min(rounds, _TIMED_STEPS))
    return dict(zip(arms, found, strict=True))


def _support_vector_errors(config: CompareConfig, images: Images) -> dict[str, float]:
    """Test error by seed, on the same labels; empty where there are no test images or too many of any."""
    errors: dict[str, float] = {}
    for run in config.runs:
        if str(run.seed) not in errors:
            error = support_vector_error(images, split_of(run, images))
            if error is not None:
                errors[str(run.seed)] = error
    return errors


def _report(config: CompareConfig, results: dict[str, Any], stopped: bool) -> None:
    from fastmeta.training.reports.plots import write_plots

    if stopped:
        print(f"\nstopped with {results['finished']} of {results['planned']} runs finished; the same command continues")
    if not results["runs"]:
        return
    print()
    print(table(results["table"]))
    for note in notes(config.runs, results):
        print(note)
    try:
        plots = write_plots(config.out)
    except ImportError as error:
        print(f"no plots: {error}")
        plots = []
    print(
        f"results: {config.out / 'results.json'}"
        + (f"; plots: {', '.join(path.name for path in plots)}" if plots else "")
    )


def notes(runs: Sequence[RunConfig], results: dict[str, Any]) -> list[str]:
    """What a reader must know to read the table right."""
    split = results["runs"][0]["split"]
    chosen = (
        f"the weights reported are those with the least error on {split['validation']} validation images"
        if split["validation"]
        else "the weights reported are the last ones"
    )
    lines = [
        f"Trained on {split['labeled']} labels and {split['unlabeled']} unlabeled images; {chosen}; tested on "
        f"{split['test']} images.",
    ]
    if results["support_vector_test_error"]:
        error = 100 * statistics.fmean(results["support_vector_test_error"].values())
        lines.append(f"A support vector machine on the same labels alone: test error {error:.1f}%.")
    if any(METHODS[run.method].uses_holdout for run in runs):
        names = ", ".join(sorted({run.method for run in runs if METHODS[run.method].uses_holdout}))
        lines.append(f"{names} also learns from {split['holdout']} hold-out labels that the other rows do not see.")
    hardened = {run.method: METHODS[run.method].example for run in runs if _hardens(run)}
    loops = sorted({example for example in hardened.values() if example is not None})
    if loops:
        names = ", ".join(sorted(method for method, example in hardened.items() if example is not None))
        programs = ", ".join(f"python -m fastmeta.examples.{loop}" for loop in loops)
        lines.append(
            f"{names}: not the paper's algorithm, which trains on the soft labels; the base makes them hard by "
            f"threshold and argmax. The paper's loop: {programs}."
        )
    return lines


def _hardens(run: RunConfig) -> bool:
    return run.base in _HARD and not getattr(base_of(run.base, run.base_settings), "soft", False)


class _Progress(contextlib.AbstractContextManager["_Progress"]):
    """One bar over the steps of all runs: time per step of one run, and time left of the whole."""

    def __init__(self, jobs: Sequence[Job], quiet: bool) -> None:
        self._steps: dict[Path, int] = {}
        self._clock: dict[Path, tuple[int, float]] = {}
        self._found = 0
        self._bar = tqdm(
            total=sum(job.config.steps or 0 for job in jobs),
            disable=quiet,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.2 if sys.stderr.isatty() else 15.0,
            bar_format="{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} steps, {remaining} left{postfix}",
        )

    def update(self, job: Job, step: int) -> None:
        """The job has finished ``step`` steps."""
        now, run = time.perf_counter(), job.folder
        if run not in self._clock:  # steps found on disk say nothing about speed
            self._found += step
        self._bar.initial = self._found
        self._bar.update(step - self._steps.get(run, 0))
        self._steps[run] = step
        since, begin = self._clock.setdefault(run, (step, now))
        if step > since:
            seconds = (now - begin) / (step - since)
            self._bar.set_postfix_str(f"{1000 * seconds:.0f} ms/step, {job}", refresh=False)

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
