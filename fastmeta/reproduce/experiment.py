"""An experiment: cells that are measured one by one and kept as they come, and a table and figures of them."""

import datetime
import json
import platform
import subprocess
import time
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

import fastmeta
from fastmeta.training.files import alone, make_folder, read_json, write_text
from fastmeta.training.reports.drawing import pyplot, save
from fastmeta.training.side_by_side import Caller, available_cores, side_by_side

Row = dict[str, Any]
"""A cell's settings and what was measured with them, as JSON knows them."""


@dataclass(frozen=True)
class Experiment:
    """A figure or table of a paper, measured here.

    Args:
        name: on the command line.
        paper: what of it, and where that is printed.
        cells: settings of each cell, by which it is known, the most informative first; for a full or a ``quick`` run.
        measure: called with the settings of a cell, gives its figures.
        table: Markdown of the rows measured so far, beside the paper's figures.
        draw: figures of the same rows, by the stem of their file.
        pages: further pages of the same rows, by the name of their file.
        parallel: cells are measured one a core; where they take times this would disturb them.
    """

    name: str
    paper: str
    cells: Callable[[bool], Sequence[Row]]
    measure: Callable[..., Row]
    table: Callable[[Sequence[Row]], str]
    draw: Callable[[Sequence[Row]], dict[str, Any]]
    pages: Callable[[Sequence[Row]], dict[str, str]] = lambda rows: {}
    parallel: bool = False

    def run(self, out: Path, quick: bool = False, minutes: float | None = None, only: Collection[str] = ()) -> None:
        """Measure what ``out/results.json`` has not, then write table.md and the figures.

        Args:
            out: a folder, which is made.
            quick: a small version that shows that everything works.
            minutes: no cell is begun after that long.
            only: ``NAME=VALUE``; cells with other settings are left for another call.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: ``out`` cannot be written to, another process works there, or its results are those of the other
                version; a number is out of its range; no cell has the settings.
        """
        if minutes is not None and minutes <= 0:
            raise ValueError(f"minutes must be > 0, got {minutes}")
        planned = list(self.cells(quick))
        asked = [settings for settings in planned if set(only) <= set(_words(settings))]
        if not asked:
            raise ValueError(
                f"only must be settings of a cell, as {' '.join(_words(planned[0]))}, got {' '.join(only)}"
            )
        pyplot()  # it would be a pity to miss it at the end
        make_folder(out)
        with alone(out):
            began, code = time.monotonic(), commit()
            before = {json.dumps(cell["settings"]): cell for cell in _read(out / "results.json", quick)}
            measured = {key: before[key] for key in map(json.dumps, planned) if key in before}
            pending = [settings for settings in asked if json.dumps(settings) not in measured]
            in_time = takewhile(lambda _: minutes is None or time.monotonic() - began <= 60 * minutes, pending)
            workers = min(available_cores(), len(pending)) if self.parallel and not quick else 1
            calls: Generator[tuple[Row, tuple[Row, float]], None, None] = (
                side_by_side(partial(_timed_alone, self.measure), in_time, workers)
                if workers > 1
                else ((settings, _timed(self.measure, settings)) for settings in in_time)
            )
            with closing(calls):
                for settings, (figures, seconds) in calls:
                    done = {"measured": figures, "seconds": seconds, "date": _now(), "commit": code}
                    measured[json.dumps(settings)] = {"settings": settings, **done}
                    self._write_results(out, list(measured.values()), quick)
                    words = " ".join(_words(settings))
                    print(f"{self.name}: {len(measured)} of {len(planned)} cells, {seconds:.0f} s: {words}", flush=True)
            cells = [measured[key] for key in map(json.dumps, planned) if key in measured]
            self._write_results(out, cells, quick)
            self._write_pages(out, cells, len(planned), quick)

    def _write_results(self, out: Path, cells: Sequence[Row], quick: bool) -> None:
        """One cell a line: indented, a curve would take hundreds of lines."""
        about = {"experiment": self.name, "paper": self.paper, "quick": quick, "machine": machine()}
        lines = ",\n".join(json.dumps(cell) for cell in cells)
        write_text(out / "results.json", f'{json.dumps(about)[:-1]},\n"cells": [\n{lines}\n]}}\n')

    def _write_pages(self, out: Path, cells: Sequence[Row], planned: int, quick: bool) -> None:
        rows = [{**cell["settings"], **cell["measured"]} for cell in cells]
        commits = ", ".join(dict.fromkeys(cell["commit"] for cell in cells))
        dates = " to ".join(sorted({cell["date"][:10] for cell in cells}))
        seconds = sum(cell["seconds"] for cell in cells)
        said = f"{self.paper}. {'A quick version, whose figures mean nothing.' if quick else ''}".rstrip()
        command = f"fastmeta reproduce {self.name}{' --quick' if quick else ''}"
        header = (
            f"# {self.name}\n\n{said}\n\n{len(cells)} of {planned} cells, {seconds:.0f} s in all, {dates}, "
            f"commit {commits}, {machine()['processor']}; `{command}` measures them again.\n\n"
        )
        write_text(out / "table.md", header + self.table(rows).rstrip() + "\n")
        for stem, figure in self.draw(rows).items():
            save(figure, out / f"{stem}.png")
        for name, page in self.pages(rows).items():
            write_text(out / name, page)


def _words(settings: Row) -> list[str]:
    return [f"{name}={value}" for name, value in settings.items()]


def _timed(measure: Callable[..., Row], settings: Row) -> tuple[Row, float]:
    start = time.perf_counter()
    return measure(**settings), round(time.perf_counter() - start, 2)


def _timed_alone(measure: Callable[..., Row], settings: Row, caller: Caller) -> tuple[Row, float]:
    """In a process of its own, one of as many as there are cores."""
    torch.set_num_threads(1)
    return _timed(measure, settings)


def _read(path: Path, quick: bool) -> list[Row]:
    """The cells of results.json; none if there is no such file. Those of the other version would be lost."""
    found = read_json(path)
    if found is not None and found["quick"] != quick:
        kind = "a quick version" if found["quick"] else "the full version"
        raise ValueError(f"out must be another folder than that of {kind}, got {path.parent}")
    return [] if found is None else found["cells"]


def markdown(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown.

    >>> print(markdown(["a", "b"], [[1, 2]]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    lines = [columns, ["---"] * len(columns), *rows]
    texts = ["| " + " | ".join(str(value) for value in line) + " |" for line in lines]
    texts[1] = texts[1].replace(" ", "")
    return "\n".join(texts)


def machine() -> Row:
    """Where a result was measured."""
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [line for line in information.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    return {
        "processor": processor,
        "cores": available_cores(),
        "torch": torch.__version__,
        "fastmeta": fastmeta.__version__,
    }


def commit() -> str:
    """Of the checkout that runs, ``-dirty`` where files differ from it; without a checkout the version."""
    root = Path(fastmeta.__file__).parents[1]
    if not (root / ".git").exists():
        return f"of version {fastmeta.__version__}"
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
