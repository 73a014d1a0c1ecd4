"""Files that are whole or not there: written to a temporary name first, then renamed over the old one."""

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

_TEMPORARY = ".partial"


def replace(
    path: Path,
    write: Callable[[BinaryIO], Any],
    *,
    fsync: bool = False,
    check: Callable[[Path], Any] | None = None,
) -> None:
    """Let ``write`` fill a file under a temporary name, then put it in the place of ``path``.

    Args:
        path: the file; its folder is made.
        write: is given the open file.
        fsync: wait until file and folder are on the disk: a power failure leaves the old file or the new one, whole.
        check: reads the temporary file; what it raises leaves ``path`` as it was.

    Raises:
        OSError: it could not be written; ``path`` is as it was, and no temporary file is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            write(file)
            if fsync:
                file.flush()
                os.fsync(file.fileno())
        if check is not None:
            check(temporary)
        os.replace(temporary, path)
        if fsync:
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path) -> None:
    """Remove what a process that was killed in :func:`replace` left in a folder."""
    for path in folder.glob(f".*{_TEMPORARY}"):
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


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


def write_text(path: Path, text: str, *, fsync: bool = False) -> None:
    """Write ``text`` in UTF-8."""
    replace(path, lambda file: file.write(text.encode()), fsync=fsync)


def write_json(path: Path, value: Any, *, fsync: bool = False) -> None:
    """Write ``value`` as indented JSON."""
    write_text(path, json.dumps(value, indent=1) + "\n", fsync=fsync)


def read_json(path: Path) -> Any:
    """Read JSON, or None if there is no such file."""
    return json.loads(path.read_text()) if path.exists() else None


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read one JSON object per line, but for a last one that was cut off; nothing if there is no such file."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Add one line."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def write_checkpoint(
    path: Path, state: dict[str, Any], *, fsync: bool = False, check: Callable[[Path], Any] | None = None
) -> None:
    """``torch.save`` that a kill cannot leave half written.

    Raises:
        OSError: it could not be written; ``path`` is as it was.
    """
    replace(path, lambda file: _save(state, file), fsync=fsync, check=check)


def read_checkpoint(path: Path) -> dict[str, Any] | None:
    """A checkpoint's tensors and plain values (no code is run), on the CPU; None if there is no such file."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def _save(state: dict[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # what the disk said; torch's own words are about positions
            raise error.__context__ from None
        raise


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Within the block no other process is in such a block for ``folder``, which is made.

    The lock is the process's own: what it forks does not hold it, and it ends with the process, however that ends.

    Raises:
        ValueError: another process is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"{folder}: another process trains this run; wait for it, or give another --out") from None
        except OSError:  # a file system without locks
            pass
        try:
            yield
        finally:
            (folder / ".lock").unlink(missing_ok=True)
