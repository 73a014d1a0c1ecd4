"""Files that are whole or not there: written to a temporary name first, then renamed over the old one."""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make the folder with its parents, and see that files can be written to it.

    Raises:
        ValueError: they cannot; nothing is left behind.
    """
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        for place in missing:  # the innermost first
            with contextlib.suppress(OSError):
                place.rmdir()
        raise ValueError(
            f"out must be a folder that can be written to, got {str(folder)!r}: {error.strerror}"
        ) from None


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON."""
    _replace(path, lambda temporary: _write_text(temporary, json.dumps(value, indent=1) + "\n"))


def read_json(path: Path) -> Any:
    """Read JSON, or None if there is no such file."""
    return json.loads(path.read_text()) if path.exists() else None


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line."""
    _replace(path, lambda temporary: _write_text(temporary, "".join(json.dumps(row) + "\n" for row in rows)))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read one JSON object per line; nothing if there is no such file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Add one line."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """``torch.save`` that a kill cannot leave half written."""
    _replace(path, lambda temporary: torch.save(state, temporary))


def read_checkpoint(path: Path) -> dict[str, Any] | None:
    """A checkpoint's tensors and plain values (no code is run), on the CPU; None if there is no such file."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)
