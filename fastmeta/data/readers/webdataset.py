"""Tar files as webdataset writes them, read where they are.

The library reads them as endless streams, without a number of images and without going to one of them; the standard
library's tarfile says where each member is, and that is all that random order needs.
"""

import io
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fastmeta.data.images import DataError, fingerprint_of
from fastmeta.data.readers.collection import Collection
from fastmeta.data.readers.labels import checked_parts, class_name, number_labels
from fastmeta.data.readers.names import Names, base_name
from fastmeta.data.readers.pictures import SUFFIXES
from fastmeta.data.readers.shards import parts_of_shards, places_of_parts, stamp_of


@dataclass(frozen=True)
class _Member:
    name: str
    start: int
    size: int
    label: str


class OpenMember:
    """Opens pictures inside of tar files."""

    def __init__(self, shards: Sequence[Path], where: torch.Tensor) -> None:
        self._shards, self._where = list(shards), where  # [M, 3]: shard, first byte, bytes
        self._files: dict[int, int] = {}

    def __call__(self, place: int) -> Image.Image:
        """The picture of a member."""
        shard, start, size = self._where[place].tolist()
        if shard not in self._files:
            self._files[shard] = os.open(self._shards[shard], os.O_RDONLY)
        return Image.open(io.BytesIO(os.pread(self._files[shard], size, start)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def __del__(self) -> None:
        for file in self._files.values():
            os.close(file)


def collect_tars(path: Path, shards: Sequence[Path]) -> Collection:
    """The pictures of tar files: ``key.jpg`` (or another kind) and ``key.cls``, a class's number or name.

    A key without ``.cls`` is unlabeled. Parts go by the shards' names; classes are the labels of "train".

    Raises:
        DataError: a shard is no tar file, or is compressed.
    """
    name = base_name(path)
    part_of = parts_of_shards(path, shards)
    kept = list(part_of)
    members: list[_Member] = []
    counts = []
    for shard in kept:
        found = _members(shard)
        members += found
        counts.append(len(found))
    if not members:
        raise DataError(f"{path}: no images found, expected key.jpg and key.cls in tar files")
    names = Names(member.name for member in members)
    parts = places_of_parts(list(part_of.values()), counts)
    classes, targets = number_labels([member.label for member in members], parts, names.__getitem__)
    parts = checked_parts(name, classes, targets, parts, names.__getitem__)
    shard_of = [number for number, count in enumerate(counts) for _ in range(count)]
    where = torch.tensor([(s, m.start, m.size) for s, m in zip(shard_of, members, strict=True)])
    below = [(m.name.rsplit("/", 1)[-1], m.size) for m in members]
    fingerprint = fingerprint_of(classes, counts, below, targets)
    opener = OpenMember(kept, where)
    return Collection(name, classes, targets, parts, names, opener, fingerprint, stamp_of(kept))


def _members(shard: Path) -> list[_Member]:
    pictures: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, str] = {}
    try:
        with tarfile.open(shard, "r:") as file:
            for info in file:
                folder, base = os.path.split(info.name)
                stem, _, kind = base.partition(".")
                key = os.path.join(folder, stem)
                if not info.isreg() or base.startswith("."):
                    continue
                if f".{kind.lower()}" in SUFFIXES:
                    pictures[key] = (info.name, info.offset_data, info.size)
                elif kind == "cls":
                    content = file.extractfile(info)
                    assert content is not None  # of a regular member
                    labels[key] = class_name(content.read().decode())
    except (tarfile.TarError, UnicodeDecodeError) as error:
        raise DataError(f"{shard}: must be a whole tar file, not compressed: {error}") from None
    return [
        _Member(f"{shard}[{name}]", start, size, labels.get(key, "")) for key, (name, start, size) in pictures.items()
    ]
