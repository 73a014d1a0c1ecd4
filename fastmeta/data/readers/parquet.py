"""Parquet shards in the schema of Hugging Face's hub, read with pyarrow."""

import io
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastmeta.data.images import DataError, fingerprint_of
from fastmeta.data.readers.collection import Collection
from fastmeta.data.readers.labels import checked_parts, class_name, number_labels
from fastmeta.data.readers.names import base_name
from fastmeta.data.readers.optional import optional
from fastmeta.data.readers.shards import RowNames, parts_of_shards, places_of_parts, stamp_of

IMAGES = ("image", "img", "images", "picture")
_LABELS = ("label", "labels", "fine_label", "class")
_KEPT = 8  # row groups a process keeps: neighbours are read together


class OpenRow:
    """Opens pictures in the rows of shards: bytes, or a struct of bytes and path.

    A row's whole row group is read, and the last few are kept.

    Args:
        shards: their paths.
        column: of the pictures.
        groups: shard, number in the shard, and rows of each row group.
    """

    def __init__(self, shards: Sequence[Path], column: str, groups: Sequence[tuple[int, int, int]]) -> None:
        self._shards, self._column = list(shards), column
        self._group_of = [(shard, group) for shard, group, _ in groups]
        self._starts = np.cumsum([0, *(rows for _, _, rows in groups)])
        self.size = sum(shard.stat().st_size for shard in shards)
        self._files: dict[int, Any] = {}
        self._kept: OrderedDict[int, Any] = OrderedDict()

    def __call__(self, place: int) -> Image.Image:
        """The picture of a row."""
        content = self.content(place)
        if not content:
            raise ValueError("there is no picture in this row")
        return Image.open(io.BytesIO(content))

    def content(self, place: int) -> bytes:
        """The picture's file, empty where there is none."""
        number = int(np.searchsorted(self._starts, place, side="right")) - 1
        value = self._read(number)[place - int(self._starts[number])].as_py()
        content, path = (value["bytes"], value.get("path")) if isinstance(value, dict) else (value, None)
        if content is None and path is not None:
            return (self._shards[self._group_of[number][0]].parent / path).read_bytes()
        return content or b""

    def _read(self, number: int) -> Any:
        if number not in self._kept:
            shard, group = self._group_of[number]
            if shard not in self._files:
                self._files[shard] = _open(self._shards[shard])
            table = self._files[shard].read_row_group(group, columns=[self._column], use_threads=False)
            self._kept[number] = table.column(0)
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(number)
        return self._kept[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}, "_kept": OrderedDict()}


@dataclass(frozen=True)
class LabeledShards:
    """What shards hold beside pictures or texts.

    Args:
        shards: those of a known part.
        files: the same, opened.
        column: of the pictures or texts.
        counts: rows of each.
        classes: those that the hub's schema names, or else the labels of "train".
        targets: ``[M]``.
        parts: by the shards' names.
    """

    shards: list[Path]
    files: list[Any]
    column: str
    counts: list[int]
    classes: tuple[str, ...]
    targets: Tensor
    parts: dict[str, Tensor]

    @property
    def names(self) -> RowNames:
        """Of the rows."""
        return RowNames([str(shard) for shard in self.shards], self.counts)


def collect_parquet(path: Path, shards: Sequence[Path]) -> Collection:
    """The pictures of parquet shards: the columns ``image`` or ``img`` and ``label``, parts by the shards' names.

    Raises:
        DataError: a shard cannot be read, or has no such columns.
        MissingPackage: pyarrow is not installed.
    """
    found = labeled_shards(path, shards, IMAGES)
    groups = [
        (number, group, file.metadata.row_group(group).num_rows)
        for number, file in enumerate(found.files)
        for group in range(file.metadata.num_row_groups)
    ]
    fingerprint = fingerprint_of(found.classes, [shard.name for shard in found.shards], found.counts, found.targets)
    return Collection(
        base_name(path),
        found.classes,
        found.targets,
        found.parts,
        found.names,
        OpenRow(found.shards, found.column, groups),
        fingerprint,
        stamp_of(found.shards),
    )


def labeled_shards(path: Path, shards: Sequence[Path], columns: Sequence[str]) -> LabeledShards:
    """Classes, targets and parts of shards with one of the ``columns`` and labels.

    Raises:
        DataError: a shard cannot be read, or has no such columns.
        MissingPackage: pyarrow is not installed.
    """
    part_of = parts_of_shards(path, shards)
    kept = list(part_of)
    files = [_open(shard) for shard in kept]
    column, label = _columns(kept[0], files[0].schema_arrow.names, columns)
    labels: list[Any] = []
    for shard, file in zip(kept, files, strict=True):
        if {column, label} - set(file.schema_arrow.names):
            raise DataError(f"{shard}: expected the columns {column} and {label}, got {file.schema_arrow.names}")
        labels += file.read(columns=[label]).column(0).to_pylist()
    strange = next((value for value in labels if not isinstance(value, int | str | None)), None)
    if strange is not None:
        raise DataError(f"{path}: column {label} must hold whole numbers or names, got {strange!r}")
    counts = [file.metadata.num_rows for file in files]
    names = RowNames([str(shard) for shard in kept], counts)
    parts = places_of_parts(list(part_of.values()), counts)
    texts = ["" if value is None or value == -1 else class_name(str(value)) for value in labels]
    classes = _class_names(files[0].schema_arrow.metadata, label)
    if classes is None:
        classes, targets = number_labels(texts, parts, names.__getitem__)
    else:
        targets = torch.tensor([-1 if value is None else value for value in labels], dtype=torch.int64)
    parts = checked_parts(base_name(path), classes, targets, parts, names.__getitem__)
    return LabeledShards(kept, files, column, counts, classes, targets, parts)


def column_and_labels(shard: Path, columns: Sequence[str]) -> tuple[list[Any], list[str]]:
    """The values of the first of the columns that a shard has, and the names of its labels, empty where there is none.

    Raises:
        DataError: it cannot be read, or has none of the columns.
        MissingPackage: pyarrow is not installed.
    """
    file = _open(shard)
    has = file.schema_arrow.names
    column = next((name for name in columns if name in has), None)
    label = next((name for name in _LABELS if name in has), None)
    if column is None:
        raise DataError(f"{shard}: expected the column {' or '.join(columns)}, got {', '.join(has)}")
    values = file.read(columns=[column]).column(0).to_pylist()
    if label is None:
        return values, [""] * len(values)
    classes = _class_names(file.schema_arrow.metadata, label)
    found = file.read(columns=[label]).column(0).to_pylist()
    known = [None if value == -1 else value for value in found]
    return values, ["" if one is None else class_name(str(classes[one] if classes else one)) for one in known]


def columns_of(shard: Path) -> list[str]:
    """Names of a shard's columns.

    Raises:
        DataError: it cannot be read.
        MissingPackage: pyarrow is not installed.
    """
    return _open(shard).schema_arrow.names


def _open(shard: Path) -> Any:
    parquet = optional("pyarrow.parquet", "pyarrow", "parquet files")
    try:
        return parquet.ParquetFile(shard, memory_map=True)
    except (ValueError, OSError) as error:  # pyarrow's own errors are among these
        raise DataError(f"{shard}: must be a whole parquet file: {error}") from None


def _columns(shard: Path, names: Sequence[str], wanted: Sequence[str]) -> tuple[str, str]:
    column = next((name for name in wanted if name in names), None)
    label = next((name for name in _LABELS if name in names), None)
    if column is None or label is None:
        raise DataError(f"{shard}: expected the columns {' or '.join(wanted[:2])}, and label, got {', '.join(names)}")
    return column, label


def _class_names(metadata: dict[bytes, bytes] | None, label: str) -> tuple[str, ...] | None:
    """From the features that the hub's files carry."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(class_name(name) for name in features[label]["names"])
    except (KeyError, TypeError, ValueError):
        return None
