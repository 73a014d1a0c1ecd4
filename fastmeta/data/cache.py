"""The folder where what was read once is kept in a form that is fast to read again."""

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from fastmeta.data.new_folder import remove_unfinished

_Stored = TypeVar("_Stored")


def cache_folder() -> Path:
    """``FASTMETA_CACHE``, or ``~/.cache/fastmeta``; it may be deleted at any time.

    >>> os.environ["FASTMETA_CACHE"] = "/scratch/cache"
    >>> cache_folder()
    PosixPath('/scratch/cache')
    >>> del os.environ["FASTMETA_CACHE"]
    """
    return Path(os.environ.get("FASTMETA_CACHE") or Path.home() / ".cache" / "fastmeta")


def stored(
    folder: Path, size: int, read: Callable[[Path], _Stored | None], write: Callable[[Path], None]
) -> _Stored | None:
    """What ``read`` finds in a folder of the cache, which ``write`` makes where it is not there or not whole.

    Processes of a machine that want the same folder wait for the first. Where it cannot be written: a
    warning, and None.
    """
    try:
        found = read(folder)
        if found is None:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _alone(folder):
                found = read(folder)
                if found is None:
                    shutil.rmtree(folder, ignore_errors=True)
                    remove_unfinished(folder)
                    free = shutil.disk_usage(folder.parent).free
                    if size > free:
                        raise OSError(f"{size / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free")
                    write(folder)
                    found = read(folder)
    except OSError as error:
        found = read(folder)
        if found is not None:  # another machine, whose lock is not seen here, was faster
            return found
        warnings.warn(
            f"{folder} cannot be written ({error}): pictures are decoded each time they are read; FASTMETA_CACHE names "
            "another folder",
            stacklevel=4,
        )
        return None
    return found


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Held by one process at a time on a machine; a process that ends, however it ends, lets go of it."""
    import fcntl

    with open(folder.parent / f".{folder.name}.lock", "w") as file:
        with suppress(OSError):  # file systems without locks: several may write, and one of them is kept
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
