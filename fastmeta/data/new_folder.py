"""Folders that appear whole or not at all."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_UNFINISHED = ".unfinished"


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write in, which takes the name ``folder`` at the end; after an error nothing is left of it.

    Raises:
        OSError: it cannot be made, or ``folder`` is there and not empty.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as root:
    ...     with new_folder(Path(root) / "made") as unfinished:
    ...         (unfinished / "a.txt").touch()
    ...     os.listdir(root)
    ['made']
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"folder must be new or empty, got {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.parent / f".{folder.name}.{secrets.token_hex(4)}{_UNFINISHED}"
    unfinished.mkdir()
    try:
        yield unfinished
        os.rename(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def flush(file: IO[Any]) -> None:
    """What was written is on the disk afterwards."""
    file.flush()
    os.fsync(file.fileno())


def remove_unfinished(folder: Path) -> None:
    """What killed processes left of a folder; no other may be writing it."""
    for left in folder.parent.glob(f".{folder.name}.*{_UNFINISHED}"):
        shutil.rmtree(left, ignore_errors=True)
