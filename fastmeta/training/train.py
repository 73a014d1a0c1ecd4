"""A run on disk: trains, logs, checkpoints, and continues where a checkpoint left off."""

import contextlib
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from fastmeta.data import ImageDataset, load_digits
from fastmeta.methods import ExampleWeights, ImputeAndWeight
from fastmeta.training.config import RunConfig
from fastmeta.training.files import (
    append_jsonl,
    read_checkpoint,
    read_json,
    write_checkpoint,
    write_json,
    write_jsonl,
)
from fastmeta.training.run import Run

_WARM_UP_STEPS = 10  # not timed: allocator and thread start-up


class ConfigMismatch(ValueError):
    """The folder holds a run with other settings."""


def train(
    config: RunConfig,
    folder: Path,
    *,
    dataset: ImageDataset | None = None,
    on_step: Callable[[int], None] = lambda step: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Train ``config`` in ``folder``, from its checkpoint if it has one; a finished run is only read.

    Writes config.json, metrics.jsonl (a line per evaluation), checkpoint.pt while it runs, and at the end model.pt (the
    weights with the least validation error), details.json and results.json.

    Args:
        config: the settings.
        folder: the run's own folder.
        dataset: the images; the digits if None.
        on_step: called with the number of finished steps after each.
        should_stop: asked before each step; if true, a checkpoint is written and the run left.

    Returns:
        What results.json holds, or None if it was stopped.

    Raises:
        ConfigMismatch: the folder holds a run with other settings.
    """
    check_folder(config, folder)
    finished = read_json(folder / "results.json")
    if finished is not None:
        on_step(config.steps)
        return finished
    with torch.random.fork_rng(devices=[]), single_thread():
        run = Run(config, load_digits() if dataset is None else dataset)
        checkpoint, metrics = folder / "checkpoint.pt", folder / "metrics.jsonl"
        saved = read_checkpoint(checkpoint)
        rows: list[dict[str, Any]] = []
        if saved is not None:
            run.load_state_dict(saved["run"])
            rows = saved["rows"]
        write_json(folder / "config.json", config.as_dict())
        write_jsonl(metrics, rows)  # lines written after the checkpoint will be written again
        on_step(run.step)

        def save() -> None:
            write_checkpoint(checkpoint, {"run": run.state_dict(), "rows": rows})

        while run.step < config.steps:
            if should_stop():
                save()
                return None
            run.train_step()
            if run.step % config.evaluate_every == 0 or run.step == config.steps:
                rows.append({"base": config.base, "method": config.method, "seed": config.seed, **run.evaluate()})
                append_jsonl(metrics, rows[-1])
            if run.step % config.checkpoint_every == 0:
                save()
            on_step(run.step)
        return _finish(run, folder)


def check_folder(config: RunConfig, folder: Path) -> None:
    """Raise :class:`ConfigMismatch` if ``folder`` holds a run whose settings differ from ``config``."""
    held = read_json(folder / "config.json")
    if held is None or held == config.as_dict():
        return
    wanted = config.as_dict()
    differing = [name for name in {**held, **wanted} if held.get(name) != wanted.get(name)]
    changes = ", ".join(f"{name}={held.get(name)!r} (now {wanted.get(name)!r})" for name in differing)
    raise ConfigMismatch(f"{folder} holds a run with {changes}; give another --out, or delete it to start again")


def _finish(run: Run, folder: Path) -> dict[str, Any]:
    config, best = run.config, run.best
    write_json(folder / "details.json", _details(run))
    write_checkpoint(folder / "model.pt", best["model"])
    results = {
        "base": config.base,
        "method": config.method,
        "seed": config.seed,
        "labels": config.labels,
        "test_error": best["test_error"],
        "validation_error": best["validation_error"],
        "step": best["step"],
        "weights": best["weights"],
        "seconds_per_step": statistics.median(run.seconds[_WARM_UP_STEPS:] or run.seconds),
        "split": run.split.sizes(),
    }
    write_json(folder / "results.json", results)
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    return results


def _details(run: Run) -> dict[str, Any]:
    """What the plots show of the unlabeled images; lists and places follow the unlabeled part of the split."""
    places = run.split.unlabeled
    imputed = run.impute_all().cpu()
    confidence, label = imputed.max(dim=1)
    method = None if run.refiner is None else run.refiner.method
    weights = method.weights.tolist() if isinstance(method, (ExampleWeights, ImputeAndWeight)) else None
    return {
        "unlabeled": places.tolist(),
        "target": run.dataset.targets.cpu()[places].tolist(),
        "imputed": label.tolist(),
        "confidence": [round(value, 4) for value in confidence.tolist()],
        "weights": None if weights is None else [round(weight, 4) for weight in weights],
        "refinements": run.refinements.rows(),
    }


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """One thread: these nets are too small for more, and sums come out the same on every machine's core count."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
