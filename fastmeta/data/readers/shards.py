"""Data sets in several files, whose names say which part each belongs to."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np
import torch
from torch import Tensor

from fastmeta.data.images import PARTS, fingerprint_of
from fastmeta.data.readers.labels import part_of, shown

_DEPTH = 3  # folders: the hub has data/train-0.parquet and default/train/0000.parquet
_FOLDERS = 20  # more than that are classes


def shards_below(path: Path, suffix: str) -> list[Path]:
    """The file itself, or the files of a kind in a folder (or else in the folders there), in order.

    >>> shards_below(Path("train-0.tar"), ".tar")
    [PosixPath('train-0.tar')]
    """
    if not path.is_dir():
        return [path] if path.suffix.lower() == suffix else []
    return _shards(path, suffix, _DEPTH)


def _shards(folder: Path, suffix: str, depth: int) -> list[Path]:
    with os.scandir(folder) as entries:
        shown_entries = sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)
    found = [Path(entry.path) for entry in shown_entries if entry.name.lower().endswith(suffix)]
    if found or depth == 1:
        return found
    folders = [entry for entry in shown_entries if entry.is_dir()]
    if len(folders) > _FOLDERS:
        return []
    return [shard for entry in folders for shard in _shards(Path(entry.path), suffix, depth - 1)]


def parts_of_shards(path: Path, shards: Sequence[Path]) -> dict[Path, str]:
    """The part of each shard, by its name or by a folder's; "train" where no name says anything.

    Where some names do, the others are left out, with a warning.
    """
    parts = {}
    for shard in shards:
        names = shard.relative_to(path).parts if shard != path else (shard.name,)
        parts[shard] = next((part for part in map(_part_of, reversed(names)) if part), "")
    if not any(parts.values()):
        return dict.fromkeys(shards, "train")
    unknown = [shard.name for shard, part in parts.items() if not part]
    if unknown:
        warnings.warn(
            f"{path}: {shown(unknown)}: left out, the names begin with no part ({', '.join(PARTS)})", stacklevel=2
        )
    return {shard: part for shard, part in parts.items() if part}


def _part_of(name: str) -> str | None:
    """SVHN's "extra" images are more of "train", which its papers leave unlabeled."""
    return "unlabeled" if name.lower().startswith("extra") else part_of(name)


def places_of_parts(part_of_each: Sequence[str], counts: Sequence[int]) -> dict[str, Tensor]:
    """Places of each part where a sequence of shards holds ``counts`` images.

    >>> places_of_parts(["test", "train", "test"], [1, 2, 1])
    {'train': tensor([1, 2]), 'test': tensor([0, 3])}
    """
    places: dict[str, list[Tensor]] = {part: [] for part in PARTS}
    start = 0
    for part, count in zip(part_of_each, counts, strict=True):
        places[part].append(torch.arange(start, start + count))
        start += count
    return {part: torch.cat(pieces) for part, pieces in places.items() if pieces}


def stamp_of(paths: Sequence[Path]) -> str:
    """Of where the files are, their sizes and times.

    Raises:
        OSError: one is not there.
    """
    status = [(str(path.absolute()), path.stat()) for path in paths]
    return fingerprint_of([(name, one.st_size, one.st_mtime_ns) for name, one in status])


class RowNames(Sequence[str]):
    """Names of rows in shards, ``shard[row]``.

    >>> list(RowNames(["a.parquet", "b.parquet"], [2, 1]))
    ['a.parquet[0]', 'a.parquet[1]', 'b.parquet[0]']
    """

    def __init__(self, shards: Sequence[str], counts: Sequence[int]) -> None:
        self._shards, self._ends = list(shards), np.cumsum([0, *counts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[index] for index in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(f"place must lie in [0, {len(self)}), got {place}")
        place %= len(self)
        shard = int(np.searchsorted(self._ends, place, side="right")) - 1
        return f"{self._shards[shard]}[{place - self._ends[shard]}]"
