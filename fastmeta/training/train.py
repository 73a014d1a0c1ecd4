"""A run on disk: trains, logs, checkpoints, and continues where a checkpoint left off."""

import contextlib
import importlib.util
import json
import shutil
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from fastmeta.data import Images
from fastmeta.data.split_file import written
from fastmeta.training.build import Built, build, load_images, record_of
from fastmeta.training.checkpoints import Checkpoints
from fastmeta.training.config import RunConfig
from fastmeta.training.files import (
    alone,
    append_jsonl,
    read_json,
    read_jsonl,
    remove_temporaries,
    write_json,
    write_jsonl,
)
from fastmeta.training.optimizers import rate_at
from fastmeta.training.outcome import write_outcome
from fastmeta.training.processes import Processes
from fastmeta.training.reports.report import write_report
from fastmeta.training.whitening import read_whitening, write_whitening


class ConfigMismatch(ValueError):
    """The folder holds a run with other settings."""


class NotFinite(RuntimeError):
    """Too many steps in a row had no finite loss."""


def train(
    config: RunConfig,
    folder: Path,
    *,
    images: Images | None = None,
    processes: Processes | None = None,
    on_step: Callable[[int], None] = lambda step: None,
    on_wait: Callable[[float], None] = lambda share: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Train ``config`` in ``folder``, from its newest good checkpoint if it has one; a finished run is only read.

    Writes config.json, split.json (the places of each part), metrics.jsonl (a line per evaluation, no wall-clock
    times), timing.jsonl, checkpoints/ while it runs, whitening.pt where the views have one, and at the end model.pt
    (the reported weights), unlabeled.csv, details.json and results.json.

    Args:
        config: the settings.
        folder: the run's own folder.
        images: the images; those that ``config.data`` names if None.
        processes: all of which call this; the first one writes.
        on_step: called with the number of finished steps after each.
        on_wait: called with the share of the time since the last evaluation that steps waited for data.
        on_progress: see :func:`fastmeta.training.build.build`.
        should_stop: asked before each step; if true, a checkpoint is written and the run left. All processes must be
            told the same, as :func:`fastmeta.training.signals.stop_requested` does.

    Returns:
        What results.json holds, or None if it was stopped.

    Raises:
        ConfigMismatch: the folder holds a run with other settings or data.
        ValueError: another process trains in the folder.
        NotFinite: ``machine.max_skipped`` steps in a row had no finite loss.
        ValueError: data and settings do not fit.
    """
    processes = processes or Processes()
    images = load_images(config) if images is None else images
    with torch.random.fork_rng(devices=[]), threads() as set_threads:
        run = build(config, images, processes, whitening=read_whitening(folder), on_progress=on_progress)
        set_threads(run.config.machine.threads or 1)
        check_folder(record_of(config, images), folder)
        results = read_json(folder / "results.json")
        if results is None:
            with alone(folder) if processes.is_first else contextlib.nullcontext():
                results = _Loop(run, folder, processes).run(on_step, on_wait, should_stop)
        else:
            on_step(run.trainer.steps)
        if results is not None and processes.is_first:
            _tidy(folder)
        return results


class _Loop:
    """One call of :func:`train`."""

    def __init__(self, run: Built, folder: Path, processes: Processes) -> None:
        self.built, self.folder, self.processes = run, folder, processes
        self.trainer, self.evaluator = run.trainer, run.evaluator
        self.record = record_of(run.config, run.images)
        self.checkpoints = Checkpoints(
            folder / "checkpoints",
            keep=run.config.machine.keep,
            sharded=run.config.machine.sharding != "none",
            fingerprint=_fingerprint(self.record),
        )
        self.rows: list[dict[str, Any]] = []
        self._board = _tensorboard(folder) if processes.is_first else None
        self._saved: int | None = None
        self._timed = (0, 0.0, 0.0)  # step, seconds of steps, seconds of waiting at the last evaluation

    def run(
        self, on_step: Callable[[int], None], on_wait: Callable[[float], None], should_stop: Callable[[], bool]
    ) -> dict[str, Any] | None:
        config, trainer = self.built.config, self.trainer
        self._resume()
        on_step(trainer.step)
        every, save_every = config.evaluation.every or 1, config.machine.checkpoint_every or 1
        try:
            while trainer.step < trainer.steps:
                if should_stop():
                    self._save()
                    return None
                trainer.train_step()
                last = trainer.step == trainer.steps
                if trainer.step % every == 0 or last:
                    on_wait(self._evaluate())
                if trainer.step % save_every == 0 and not last:
                    self._save()
                on_step(trainer.step)
            return self._finish()
        finally:
            trainer.batches.close()
            if self._board is not None:
                self._board.close()

    def _resume(self) -> None:
        saved = self.checkpoints.latest({"trainer": self.trainer.state_dict()} if self.checkpoints.sharded else None)
        if saved is not None:
            self._saved, state = saved
            self.trainer.load_state_dict(state["trainer"])
            self.evaluator.load_state_dict(state["evaluator"])
            self.rows = state["rows"]
            self._timed = (self.trainer.step, 0.0, 0.0)
        if self.processes.is_first:
            remove_temporaries(self.folder)
            if self.built.whitening is not None and read_whitening(self.folder) is None:
                write_whitening(self.folder, self.built.whitening)
            write_json(self.folder / "config.json", self.record)
            write_json(self.folder / "split.json", written(self.built.images, self.built.split))
            write_jsonl(self.folder / "metrics.jsonl", self.rows)  # lines after the checkpoint are written again
            timing = [row for row in read_jsonl(self.folder / "timing.jsonl") if row["step"] <= self.trainer.step]
            write_jsonl(self.folder / "timing.jsonl", timing)

    def _save(self) -> None:
        """A checkpoint, but for a step without a finite loss: what may be broken takes no good one's place."""
        if self._check_finite():
            return
        step = self.trainer.step
        state = {
            "trainer": self.trainer.state_dict(),
            "evaluator": self.evaluator.state_dict(),
            "rows": self.rows,
        }
        self.checkpoints.save(step, state, is_best=self.evaluator.best.get("step") == step)
        self._saved = step

    def _check_finite(self) -> int:
        """How many steps in a row, up to now, had no finite loss."""
        skipped, in_a_row = self.trainer.skipped.tolist()
        if in_a_row >= self.built.config.machine.max_skipped:
            good = "there is no checkpoint" if self._saved is None else f"the last checkpoint is of step {self._saved}"
            raise NotFinite(
                f"the loss of the last {in_a_row} steps was not finite (step {self.trainer.step}; {skipped} in all); "
                f"{good} ({self.checkpoints.folder})"
            )
        return in_a_row

    def _evaluate(self) -> float:
        """A line of metrics.jsonl and one of timing.jsonl; the share of the time that steps waited for data."""
        trainer, config = self.trainer, self.built.config
        averages = trainer.step_averages.read()
        self._check_finite()
        trainer.synchronize()
        row: dict[str, Any] = {"base": config.base, "method": config.method, "seed": config.seed, "step": trainer.step}
        row["learning_rate"] = trainer.optimizer_config.peak * rate_at(
            trainer.schedule, trainer.step - 1, trainer.steps
        )
        row.update(averages)
        row["skipped_steps"] = int(trainer.skipped[0])
        row.update(self.evaluator(trainer.step, trainer.model, trainer.average.model))
        self.rows.append(row)
        step, seconds, waited = self._timed
        self._timed = (trainer.step, trainer.seconds, trainer.batches.waited)
        steps, seconds, waited = trainer.step - step, trainer.seconds - seconds, trainer.batches.waited - waited
        images = steps * (trainer.batches.data.labeled_batch + trainer.batches.data.unlabeled_batch)
        share = waited / max(seconds, 1e-9)
        if self.processes.is_first:
            append_jsonl(self.folder / "metrics.jsonl", row)
            timing = {
                "step": trainer.step,
                "seconds_per_step": seconds / steps,
                "wait_share": share,
                "images_per_second": images / max(seconds, 1e-9),
                "time": time.time(),
            }
            append_jsonl(self.folder / "timing.jsonl", timing)
            for name, value in row.items():
                if self._board is not None and isinstance(value, float):
                    self._board.add_scalar(name, value, trainer.step)
        return share

    def _finish(self) -> dict[str, Any]:
        self.trainer.synchronize()
        return write_outcome(self.built, self.folder, self.processes)


def _tensorboard(folder: Path) -> Any:
    """A writer of events for TensorBoard where it is installed; metrics.jsonl has the same numbers."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"))


def _tidy(folder: Path) -> None:
    """What follows results.json; a run killed in between has it done when it is started again."""
    (folder / ".lock").unlink(missing_ok=True)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    if not (folder / "report.html").exists():
        try:
            write_report([folder], folder / "report.html")
        except OSError as error:  # the run is finished, and `fastmeta report` writes the page at any time
            warnings.warn(f"{folder / 'report.html'} could not be written: {error}", stacklevel=3)


def _fingerprint(record: dict[str, Any]) -> str:
    """Of settings and data: what :func:`check_folder` compares."""
    return f"{zlib.crc32(json.dumps({**record, 'machine': None}, sort_keys=True).encode()):08x}"


def check_folder(record: dict[str, Any], folder: Path) -> None:
    """Raise :class:`ConfigMismatch` if ``folder`` holds a run whose settings or data differ from ``record``.

    How it uses its machine may differ.
    """
    held = read_json(folder / "config.json")
    if held is None:
        return
    before, now = (dict(_flat({**values, "machine": None})) for values in (held, record))
    if before == now:
        return
    differing = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    changes = ", ".join(f"{name}={before.get(name)!r} (now {now.get(name)!r})" for name in differing)
    raise ConfigMismatch(f"{folder} holds a run with {changes}; give another --out, or delete it to start again")


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value


@contextlib.contextmanager
def threads() -> Iterator[Callable[[int], None]]:
    """The number of threads may be set within the block."""
    before = torch.get_num_threads()
    try:
        yield torch.set_num_threads
    finally:
        torch.set_num_threads(before)
