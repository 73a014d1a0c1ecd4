"""Tensors that are spread over processes (DTensor), in files of ``torch.distributed.checkpoint`` with checksums."""

import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.distributed.checkpoint
from torch.distributed.tensor import DTensor

from fastmeta.ops.process_group import running_processes

_MARK = "fastmeta sharded tensor"
_CHUNK = 1 << 22


def split(state: Any, place: str = "state") -> tuple[Any, dict[str, DTensor]]:
    """The state with a mark for each spread tensor, and these tensors by the name in the mark.

    >>> split({"rows": [{"step": 1}]})
    ({'rows': [{'step': 1}]}, {})
    """
    if isinstance(state, DTensor):
        return {_MARK: place}, {place: state}
    tensors: dict[str, DTensor] = {}
    if isinstance(state, dict):
        plain: Any = {}
        for key, value in state.items():
            plain[key], found = split(value, f"{place}.{key}")
            tensors |= found
        return plain, tensors
    if isinstance(state, (list, tuple)):
        parts = [split(value, f"{place}.{number}") for number, value in enumerate(state)]
        for _, found in parts:
            tensors |= found
        return (type(state)(part for part, _ in parts), tensors) if tensors else (state, tensors)
    return state, tensors


def join(state: Any, tensors: dict[str, DTensor]) -> Any:
    """The state with its tensors in place of the marks.

    Raises:
        KeyError: there is no tensor for a mark.
    """
    if isinstance(state, dict):
        if state.keys() == {_MARK}:
            return tensors[state[_MARK]]
        return {key: join(value, tensors) for key, value in state.items()}
    if isinstance(state, (list, tuple)) and tensors:
        return type(state)(join(value, tensors) for value in state)
    return state


def write_shards(folder: Path, tensors: dict[str, DTensor]) -> dict[str, int]:
    """Every process writes its part, flushed to the disk; the checksums of all files, equal on all of them.

    Raises:
        OSError: a process could not.
    """
    try:
        torch.distributed.checkpoint.save(tensors, checkpoint_id=folder, no_dist=running_processes() == 1)
    except torch.distributed.checkpoint.CheckpointException as error:
        raise OSError(_cause(error)) from None
    world = running_processes()
    rank = torch.distributed.get_rank() if world > 1 else 0
    names = [path.name for path in folder.iterdir()]
    mine = [name for name in names if name.startswith(f"__{rank}_") or (rank == 0 and name == ".metadata")]
    sums: list[dict[str, int]] = [{}] * world
    own = {name: checksum(folder / name) for name in mine}
    if world == 1:
        return own
    torch.distributed.all_gather_object(sums, own)
    return {name: value for each in sums for name, value in each.items()}


def read_shards(folder: Path, checksums: dict[str, int], tensors: dict[str, DTensor]) -> None:
    """Fill the tensors, whatever the number of processes that wrote them.

    Raises:
        ValueError: a file is missing or not as it was written, or the tensors are others; on every process.
    """
    world = running_processes()
    rank = torch.distributed.get_rank() if world > 1 else 0
    causes: list[str | None] = [None] * world
    cause = next(
        (why for name in sorted(checksums)[rank::world] if (why := _wrong(folder / name, checksums[name]))), None
    )
    if world > 1:
        torch.distributed.all_gather_object(causes, cause)
    else:
        causes = [cause]
    for each in causes:
        if each is not None:
            raise ValueError(each)
    try:
        torch.distributed.checkpoint.load(tensors, checkpoint_id=folder, no_dist=world == 1)
    except torch.distributed.checkpoint.CheckpointException as error:
        raise ValueError(_cause(error)) from None


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def _wrong(path: Path, expected: int) -> str | None:
    try:
        return None if checksum(path) == expected else f"corrupt: the checksum of {path.name} does not match"
    except OSError as error:
        return f"{path.name}: {error.strerror}"


def _cause(error: Any) -> str:
    """Of what went wrong on some process, the first. torch keeps what the disk said to itself."""
    rank, (first, _) = next(iter(error.failures.items()))
    words = (getattr(first, "strerror", None) or str(first)).splitlines()[0]
    return f"process {rank}: {words}" + (" (is the disk full?)" if "inline_container" in words else "")
