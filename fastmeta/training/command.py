"""``fastmeta train``: one run with a progress bar, in one process or in those of torchrun."""

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastmeta.training.build import load_images, record_of, resolve
from fastmeta.training.config import RunConfig
from fastmeta.training.files import make_folder
from fastmeta.training.processes import launched
from fastmeta.training.signals import stop_requested
from fastmeta.training.train import check_folder, train


def train_command(config: RunConfig, out: Path) -> int:
    """Train ``config`` in the folder ``out`` and print what came of it.

    Ctrl-C or SIGTERM saves a checkpoint and leaves; the same command continues.

    Returns:
        The exit status: 0, or 130 if Ctrl-C stopped it.
    """
    with launched(config.machine.device) as processes, stop_requested() as stop:
        images = load_images(config)
        resolved = resolve(config, images)
        check_folder(record_of(config, images), out)  # all that can be wrong with the data, before anything is written
        made = [place for place in (out, *out.parents) if not place.exists()]
        if processes.is_first:
            make_folder(out)
        with _bar(resolved, visible=processes.is_first) as bar:

            def on_step(step: int) -> None:
                bar.update(step - bar.n)

            def on_wait(share: float) -> None:
                bar.set_postfix_str(f"{100 * share:.0f}% waiting for data", refresh=False)

            def on_progress(done: int, total: int) -> None:
                bar.set_postfix_str("" if done == total else f"features of {done} of {total} images")

            try:
                results = train(
                    config,
                    out,
                    images=images,
                    processes=processes,
                    on_step=on_step,
                    on_wait=on_wait,
                    on_progress=on_progress,
                    should_stop=stop,
                )
            except ValueError:  # settings that do not fit: folders in which nothing was written go again
                with contextlib.suppress(OSError):
                    for place in made:
                        place.rmdir()
                raise
        if processes.is_first:
            print(_summary(results, out))
        return 0 if results is not None or stop.is_termination else 130


def _bar(config: RunConfig, *, visible: bool) -> tqdm:
    return tqdm(
        total=config.steps,
        disable=not visible,
        unit="step",
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 15.0,
        desc=config.arm,
    )


def _summary(results: dict[str, Any] | None, out: Path) -> str:
    if results is None:
        return f"stopped; the same command continues ({out}{os.sep})"
    lines = []
    for part in ("test", "validation"):
        error = results.get(f"{part}_error")
        if error is not None:
            lines.append(f"{part} error {100 * error:.1f}% of {results['split'][part]} images")
    split = results["split"]
    lines.append(f"trained on {split['labeled']} labels and {split['unlabeled']} unlabeled images")
    if results["unreadable"]:
        lines.append(f"{len(results['unreadable'])} images could not be read (results.json names them)")
    lines.append(f"results: {out}{os.sep}")
    return "\n".join(lines)
