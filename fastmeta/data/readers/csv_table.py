"""A CSV of paths and labels."""

import csv
import os
from pathlib import Path

import torch

from fastmeta.data.images import PARTS, DataError, fingerprint_of
from fastmeta.data.readers.collection import Collection
from fastmeta.data.readers.folder import OpenFile
from fastmeta.data.readers.labels import PART_NAMES, checked_parts, class_name, number_labels, shown
from fastmeta.data.readers.names import Names

_DELIMITERS = (",", ";", "\t")  # a spreadsheet's choice depends on its language


def collect_csv(path: Path) -> Collection:
    """The pictures of a CSV with the columns ``path,label`` and, optionally, ``part``.

    Paths are absolute or relative to the CSV. A row without a label is unlabeled; without a part it is of "train". The
    classes are the labels of "train"; a label in "unlabeled" is the truth which reports compare with.

    Raises:
        DataError: columns are missing, a part is unknown, a path is there twice, files are missing (all are counted),
            or a label is no class.
    """
    lines, rows = _rows(path)
    relative = [row["path"].strip() for row in rows]
    labels = [class_name(row.get("label") or "") for row in rows]

    def describe(place: int) -> str:
        return f"{path}: line {lines[place]}"

    places: dict[str, list[int]] = {part: [] for part in PARTS}
    for place, row in enumerate(rows):
        asked = (row.get("part") or "").strip().lower() or ("train" if labels[place] else "unlabeled")
        if asked not in PART_NAMES:
            raise DataError(f"{describe(place)}: part must be one of {', '.join(PARTS)}, got {asked!r}")
        places[PART_NAMES[asked]].append(place)
    names = [os.path.normpath(path.absolute().parent / name) for name in relative]
    status = _status(path, lines, names)
    parts = {part: torch.tensor(where, dtype=torch.int64) for part, where in places.items()}
    classes, targets = number_labels(labels, parts, describe)
    parts = checked_parts(path.name, classes, targets, parts, describe)
    sizes = torch.tensor([one.st_size for one in status])
    times = torch.tensor([one.st_mtime_ns for one in status])
    opened = Names(names)
    order = [(part, where.tolist()) for part, where in parts.items()]
    fingerprint = fingerprint_of(classes, relative, sizes, targets, order)
    stamp = fingerprint_of(opened.digest(), sizes, times)
    return Collection(path.name, classes, targets, parts, opened, OpenFile(opened), fingerprint, stamp)


def _rows(path: Path) -> tuple[list[int], list[dict[str, str]]]:
    """The rows with a path, and the line that each ends in."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        try:
            header = file.readline()
            delimiter = next((d for d in _DELIMITERS if {"path", "label"} <= _columns(header, d)), None)
            if delimiter is None:
                raise DataError(f"{path}: the first line must name the columns path and label, got {header.strip()!r}")
            names = [name.strip().lower() for name in next(csv.reader([header], delimiter=delimiter))]
            reader = csv.DictReader(file, names, delimiter=delimiter)
            rows = [(reader.line_num + 1, row) for row in reader if (row["path"] or "").strip()]
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: must be UTF-8 text, got byte {error.object[error.start]:#x}") from None
    if not rows:
        raise DataError(f"{path}: no images found, expected a row an image below the line of columns")
    return [line for line, _ in rows], [row for _, row in rows]


def _columns(header: str, delimiter: str) -> set[str]:
    return {name.strip().strip('"').lower() for name in header.split(delimiter)}


def _status(path: Path, lines: list[int], names: list[str]) -> list[os.stat_result]:
    """Of each file; that all are there, once, is checked."""
    first: dict[str, int] = {}
    missing: list[str] = []
    found: list[os.stat_result] = []
    for place, name in enumerate(names):
        if name in first:
            raise DataError(f"{path}: {name} is there twice, in lines {lines[first[name]]} and {lines[place]}")
        first[name] = place
        try:
            found.append(os.stat(name))
        except OSError:
            missing.append(name)
    if missing:
        raise DataError(f"{path}: {len(missing)} of {len(names)} files are missing: {shown(missing)}")
    return found
