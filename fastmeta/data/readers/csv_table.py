"""A CSV of paths and labels."""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastmeta.data.images import PARTS, DataError, fingerprint_of
from fastmeta.data.readers.collection import Collection
from fastmeta.data.readers.folder import OpenFile
from fastmeta.data.readers.labels import PART_NAMES, checked_parts, class_name, number_labels, shown
from fastmeta.data.readers.names import Names

TABLES = (".csv", ".tsv")
_COLUMNS = ("path", "label")
_LONGEST = 2**27  # characters of a field; csv's own limit is 131,072
_DELIMITERS = (",", ";", "\t")  # a spreadsheet's choice depends on its language


def collect_csv(path: Path) -> Collection:
    """The pictures of a CSV with the columns ``path,label`` and, optionally, ``part``.

    Paths are absolute or relative to the CSV. A row without a label is unlabeled; without a part it is of "train". The
    classes are the labels of "train"; a label in "unlabeled" is the truth which reports compare with.

    Raises:
        DataError: columns are missing, a part is unknown, a path is there twice, files are missing (all are counted),
            or a label is no class.
    """
    lines, rows = read_rows(path, _COLUMNS)
    if not all(row["path"].strip() for row in rows):
        line = next(line for line, row in zip(lines, rows, strict=True) if not row["path"].strip())
        raise DataError(f"{path}: line {line}: path must not be empty")
    relative = [row["path"].strip() for row in rows]
    names = [os.path.normpath(path.absolute().parent / name) for name in relative]
    status = _status(path, lines, names)
    classes, targets, parts = labels_and_parts(path.name, rows, [f"{path}: line {line}" for line in lines])
    sizes = torch.tensor([one.st_size for one in status])
    times = torch.tensor([one.st_mtime_ns for one in status])
    opened = Names(names)
    order = [(part, where.tolist()) for part, where in parts.items()]
    fingerprint = fingerprint_of(classes, relative, sizes, targets, order)
    stamp = fingerprint_of(opened.digest(), sizes, times)
    return Collection(path.name, classes, targets, parts, opened, OpenFile(opened), fingerprint, stamp)


def labels_and_parts(
    name: str, rows: Sequence[Mapping[str, str | None]], where: Sequence[str]
) -> tuple[tuple[str, ...], Tensor, dict[str, Tensor]]:
    """Classes, targets ``[M]`` and parts of rows with ``label`` and, optionally, ``part``.

    Args:
        name: of the data set.
        rows: M of them.
        where: what an error calls each.

    Raises:
        DataError: a part is unknown, or a label is no class.
    """
    labels = [class_name(row.get("label") or "") for row in rows]
    places: dict[str, list[int]] = {part: [] for part in PARTS}
    for place, row in enumerate(rows):
        asked = (row.get("part") or "").strip().lower() or ("train" if labels[place] else "unlabeled")
        if asked not in PART_NAMES:
            raise DataError(f"{where[place]}: part must be one of {', '.join(PARTS)}, got {asked!r}")
        places[PART_NAMES[asked]].append(place)
    parts = {part: torch.tensor(found, dtype=torch.int64) for part, found in places.items()}
    classes, targets = number_labels(labels, parts, where.__getitem__)
    return classes, targets, checked_parts(name, classes, targets, parts, where.__getitem__)


def has_columns(path: Path, columns: Sequence[str]) -> bool:
    """Whether the first line of a CSV names these.

    Raises:
        DataError: it is not UTF-8.
    """
    return _delimiter(_header(path), columns) is not None


def read_rows(path: Path, columns: Sequence[str]) -> tuple[list[int], list[dict[str, str]]]:
    """The rows that are not blank in all of the columns, and the line that each ends in.

    Raises:
        DataError: the first line does not name the columns, there are no rows, a row has more or fewer fields than
            that, quotes are not in pairs, or it is not UTF-8.
    """
    header = _header(path)
    delimiter = _delimiter(header, columns)
    if delimiter is None:
        raise DataError(
            f"{path}: the first line must name the columns {' and '.join(columns)}, got {header.strip()!r}; of "
            "texts: text and label"
        )
    names = [name.strip().lower() for name in next(csv.reader([header], delimiter=delimiter))]
    rows: list[tuple[int, dict[str, str]]] = []
    longest = csv.field_size_limit(_LONGEST)
    with open(path, newline="", encoding="utf-8-sig") as file:
        try:
            file.readline()
            reader = csv.DictReader(file, names, delimiter=delimiter, strict=True)
            for row in reader:
                line = reader.line_num + 1
                if None in row or any(row[column] is None for column in columns):
                    raise DataError(
                        f"{path}: line {line}: expected {len(names)} fields, {', '.join(names)}; what has "
                        f"{delimiter!r} in it must be in quotes"
                    )
                if any(row[column].strip() for column in columns):
                    rows.append((line, row))
        except UnicodeDecodeError as error:
            raise _not_text(path, error) from None
        except csv.Error as error:
            raise DataError(f"{path}: line {reader.reader.line_num + 1}: quotes must be in pairs: {error}") from None
        finally:
            csv.field_size_limit(longest)
    if not rows:
        raise DataError(f"{path}: nothing found, expected a row for each {columns[0]} below the line of columns")
    return [line for line, _ in rows], [row for _, row in rows]


def _header(path: Path) -> str:
    with open(path, newline="", encoding="utf-8-sig") as file:
        try:
            return file.readline()
        except UnicodeDecodeError as error:
            raise _not_text(path, error) from None


def _not_text(path: Path, error: UnicodeDecodeError) -> DataError:
    return DataError(f"{path}: must be UTF-8 text, got byte {error.object[error.start]:#x}")


def _delimiter(header: str, columns: Sequence[str]) -> str | None:
    return next((one for one in _DELIMITERS if set(columns) <= _columns(header, one)), None)


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
