"""Checkpoints of a run: whole or not there, read back with care, the last few and the best one kept."""

import re
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed

from fastmeta.ops.process_group import running_processes
from fastmeta.training.files import sync_folder, write_checkpoint
from fastmeta.training.sharded import join, read_shards, split, write_shards

FORMAT, VERSION = "fastmeta checkpoint", 1
_PLAIN = "state.pt"  # of a sharded one, what is not spread over the processes
_T = TypeVar("_T")
_NAME = re.compile(r"step-(\d+)(\.best)?(\.pt)?")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or there are some and none can be read."""


class _Unusable(Exception):
    """Why a file is passed over."""


class _Saved(NamedTuple):
    step: int
    is_best: bool
    path: Path


class Checkpoints:
    """The checkpoints in a folder, ``step-000001000.pt`` or, for the best so far, ``step-000001000.best.pt``.

    A save is written under a temporary name, flushed to the disk and then renamed: a kill, a full disk or a power
    failure at any moment leaves all earlier ones as they were. Only then are older ones removed. What is read is
    checked first, the checksums of every byte included, which ``torch.load`` does not look at.

    In a process group every process makes the same calls. The first one writes and reads, and the others are sent
    what it reads, or its error; with ``sharded`` every process writes and reads its own part with
    ``torch.distributed.checkpoint``, in a folder a step that is renamed once all parts are on the disk.

    Args:
        folder: made if it is not there; temporary files that a killed process left in it are removed.
        keep: how many of the last ones are kept, besides the best.
        sharded: for states that are spread over processes (FSDP); they may be read by another number of processes.
        fingerprint: of the run's settings: a checkpoint with another one is passed over.

    Raises:
        ValueError: ``keep`` is not positive.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     checkpoints = Checkpoints(folder)
    ...     for step in (10, 20, 30, 40):
    ...         path = checkpoints.save(step, {"weight": torch.ones(2)}, is_best=step == 10)
    ...     print(sorted(path.name for path in Path(folder).iterdir()), checkpoints.latest())
    ['step-000000010.best.pt', 'step-000000030.pt', 'step-000000040.pt'] (40, {'weight': tensor([1., 1.])})
    """

    def __init__(self, folder: Path | str, *, keep: int = 2, sharded: bool = False, fingerprint: str = "") -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.folder, self.keep, self.sharded, self.fingerprint = Path(folder), keep, sharded, fingerprint
        self._unusable: set[Path] = set()
        self._read_back = False
        _on_first(self._make_folder)

    def save(self, step: int, state: dict[str, Any], *, is_best: bool = False) -> Path:
        """Write ``state`` and remove what is older than the last ``keep``, except the best.

        Args:
            step: how many steps are done.
            state: tensors and plain values, nested in dicts and lists.
            is_best: it takes the place of the best one before.

        Returns:
            Where it is.

        Raises:
            CheckpointError: it could not be written, or could not be read back. All earlier ones are as they were.
        """
        content = {"format": FORMAT, "version": VERSION, "fingerprint": self.fingerprint, "step": step}
        try:
            path = _on_first(lambda: self._path(step, is_best))
            if self.sharded:
                self._write_sharded(path, content, state)
            else:
                _on_first(lambda: self._write(path, {**content, "state": state}))
        except (OSError, _Unusable) as error:
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(
                f"step {step} could not be saved in {self.folder}: {reason}; {self._held()}"
            ) from None
        _on_first(lambda: self._remove_old(path))
        return path

    def latest(self, like: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]] | None:
        """The step and state of the newest checkpoint that can be read, tensors on the CPU; None if there is none.

        One that cannot be read, is not ours, is of other settings or of a newer version is passed over with a warning
        that says why, and stays where it is.

        Args:
            like: where ``sharded``: a state whose spread tensors are filled in place.

        Raises:
            CheckpointError: there are checkpoints and none can be read: nothing starts from zero by accident.
        """
        return self._first_readable(_on_first(self._found)[::-1], like or {})

    def best(self, like: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]] | None:
        """Like :meth:`latest`, of those that were saved with ``is_best``."""
        return self._first_readable([saved for saved in _on_first(self._found)[::-1] if saved.is_best], like or {})

    def _make_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob(".step-*"):
            _remove(path)

    def _found(self) -> list[_Saved]:
        matches = [(_NAME.fullmatch(path.name), path) for path in self.folder.iterdir()]
        return sorted(_Saved(int(match[1]), match[2] is not None, path) for match, path in matches if match)

    def _path(self, step: int, is_best: bool) -> Path:
        """Saved twice, a best step stays the best."""
        best = is_best or any(saved.is_best for saved in self._found() if saved.step == step)
        return self.folder / f"step-{step:09}{'.best' if best else ''}{'' if self.sharded else '.pt'}"

    def _held(self) -> str:
        """For messages: what a run can go on from."""
        steps = [saved.step for saved in self._found() if saved.path not in self._unusable]
        return f"the last good checkpoint is of step {steps[-1]}" if steps else "there is no earlier checkpoint"

    def _write(self, path: Path, content: dict[str, Any]) -> None:
        # What could never be read back is to be known at the first save, not when it is needed.
        check = None if self._read_back else _content
        write_checkpoint(path, content, fsync=True, check=check)
        self._read_back = True

    def _write_sharded(self, path: Path, content: dict[str, Any], state: dict[str, Any]) -> None:
        """Under a temporary name; the file that names all others is written last, then the folder is renamed."""
        temporary = path.with_name(f".{path.name}")
        plain, tensors = split(state)
        try:
            _on_first(lambda: temporary.mkdir())
            content["shards"] = write_shards(temporary, tensors) if tensors else {}
            _on_first(lambda: self._write(temporary / _PLAIN, {**content, "state": plain}))
            _on_first(lambda: _rename(temporary, path))
        finally:
            if _rank() == 0:
                _remove(temporary)

    def _remove_old(self, path: Path) -> None:
        self._unusable.discard(path)
        found = [saved for saved in self._found() if saved.path not in self._unusable]
        step = next(saved.step for saved in found if saved.path == path)
        best = max((saved.step for saved in found if saved.is_best), default=step)
        kept = {saved.step for saved in found[-self.keep :]} | {best}
        for saved in found:
            if saved.step not in kept or (saved.step == step and saved.path != path):
                _remove(saved.path)

    def _first_readable(self, found: list[_Saved], like: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
        causes = []
        for saved in found:
            try:
                return saved.step, self._read(saved, like)
            except _Unusable as error:
                self._unusable.add(saved.path)
                causes.append(f"{saved.path}: {error}")
                if _rank() == 0:
                    warnings.warn(f"checkpoint passed over: {causes[-1]}", stacklevel=3)
        if causes:
            raise CheckpointError(
                f"none of {len(causes)} checkpoints can be read; to start from nothing, remove {self.folder}\n"
                + "\n".join(causes)
            )
        return None

    def _read(self, saved: _Saved, like: dict[str, Any]) -> dict[str, Any]:
        content = _on_first(lambda: self._checked(saved))
        if not self.sharded:
            return content["state"]
        _, tensors = split(like)
        try:
            if content["shards"]:
                read_shards(saved.path, content["shards"], tensors)
            return join(content["state"], tensors)
        except ValueError as error:
            raise _Unusable(str(error)) from None
        except KeyError as error:
            raise _Unusable(f"its tensor {error} is not part of this run") from None

    def _checked(self, saved: _Saved) -> dict[str, Any]:
        if saved.path.is_dir() != self.sharded:
            raise _Unusable("it is not sharded, this run is" if self.sharded else "it is sharded, this run is not")
        content = _content(saved.path / _PLAIN if self.sharded else saved.path)
        if content["version"] > VERSION:
            raise _Unusable(f"format {content['version']} of a newer fastmeta, this one reads {VERSION}")
        if content["fingerprint"] != self.fingerprint:
            raise _Unusable(f"of other settings: {content['fingerprint']!r}, not {self.fingerprint!r}")
        if content["step"] != saved.step:
            raise _Unusable(f"renamed: it is of step {content['step']}")
        return content


def _content(path: Path) -> dict[str, Any]:
    """What a file holds, every byte of it compared with its checksum: ``torch.load`` does not compare."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        content = torch.load(path, map_location="cpu", weights_only=True) if broken is None else None
    except zipfile.BadZipFile:
        raise _Unusable("cut off, or not a checkpoint") from None
    except Exception as error:  # whatever a file of random bytes may cause
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _Unusable(f"it cannot be read: {cause}") from None
    if broken is not None:
        raise _Unusable(f"corrupt: the checksum of {broken} does not match")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise _Unusable("not a checkpoint of fastmeta")
    return content


def _rename(temporary: Path, path: Path) -> None:
    _remove(path)  # of the same step, so the same
    temporary.rename(path)
    sync_folder(path.parent)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _rank() -> int:
    return torch.distributed.get_rank() if running_processes() > 1 else 0


def _on_first(call: Callable[[], _T]) -> _T:
    """What the call returns or raises in the first process, in all of them."""
    if running_processes() == 1:
        return call()
    outcome: list[Any] = [None, None]
    if _rank() == 0:
        try:
            outcome[0] = call()
        except Exception as error:
            outcome[1] = error
    torch.distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
