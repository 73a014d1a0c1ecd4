"""Tables of texts and labels: a CSV, or parquet shards as on the hub."""

from collections.abc import Sequence
from pathlib import Path

import torch

from fastmeta.data.images import DataError
from fastmeta.data.readers.csv_table import TABLES, has_columns, labels_and_parts, read_rows
from fastmeta.data.readers.labels import PART_NAMES, class_name, part_of
from fastmeta.data.readers.names import base_name
from fastmeta.data.readers.parquet import IMAGES, column_and_labels, columns_of, labeled_shards
from fastmeta.data.readers.shards import shards_below
from fastmeta.data.text import Texts

_CSV = ("text", "label")
_PARQUET = ("text", "content", "sentence", "review")


def open_texts(path: Path, length: int | None = None, tokenizer: str | None = None) -> Texts | None:
    """The texts of a CSV or of parquet shards; None where it has pictures or is something else.

    A CSV has the columns ``text,label`` and, optionally, ``part``: a row without a label is unlabeled; without a part
    it is of "train". Shards have ``text`` and ``label``, and parts by their names.

    Args:
        path: a CSV, a shard, or a folder of shards.
        length: L, tokens of a text; the last ones are kept. None: 128.
        tokenizer: as :class:`fastmeta.data.text.Texts` takes it.

    Raises:
        DataError: a part is unknown, a label is no class, or a shard cannot be read.
        MissingPackage: tokenizers or pyarrow is not installed.
        ValueError: the length is less than 3.
    """
    if path.suffix.lower() in TABLES and path.is_file():
        if not has_columns(path, _CSV):
            return None
        lines, rows = read_rows(path, _CSV)
        names: Sequence[str] = [f"{path}: line {line}" for line in lines]
        classes, targets, parts = labels_and_parts(path.name, rows, names)
        texts = [row["text"] for row in rows]
    else:
        shards = shards_below(path, ".parquet")
        found = set(columns_of(shards[0])) if shards else set()
        if not found & set(_PARQUET) or found & set(IMAGES):
            return None
        read = labeled_shards(path, shards, _PARQUET)
        classes, targets, parts, names = read.classes, read.targets, read.parts, read.names
        columns = [file.read(columns=[read.column]).column(0).to_pylist() for file in read.files]
        texts = _texts([text for column in columns for text in column], names)
    return Texts(base_name(path), texts, targets, classes, parts, names, tokenizer=tokenizer, length=length)


def open_texts_to_predict(path: Path, classes: tuple[str, ...], length: int, tokenizer: str) -> Texts | None:
    """The same, where there need be no labels, nor a column of them, and any of the classes may be in any part.

    A label that is none of the classes is none; a text of no known part is of "all".
    """
    values: list[object] = []
    labels: list[str] = []
    asked: list[str] = []
    if path.suffix.lower() in TABLES and path.is_file():
        if not has_columns(path, _CSV[:1]):
            return None
        lines, rows = read_rows(path, _CSV[:1])
        names: list[str] = [f"{path}: line {line}" for line in lines]
        values = [row["text"] for row in rows]
        labels = [class_name(row.get("label") or "") for row in rows]
        asked = [PART_NAMES.get((row.get("part") or "").strip().lower(), "all") for row in rows]
    else:
        shards = shards_below(path, ".parquet")
        if not shards or not set(columns_of(shards[0])) & set(_PARQUET):
            return None
        names = []
        for shard in shards:
            found, names_of_labels = column_and_labels(shard, _PARQUET)
            values += found
            labels += names_of_labels
            asked += [part_of(shard.name) or part_of(shard.parent.name) or "all"] * len(found)
            names += [f"{shard}[{row}]" for row in range(len(found))]
    number = {name: place for place, name in enumerate(classes)}
    targets = torch.tensor([number.get(label, -1) for label in labels])
    made = Texts(
        base_name(path), _texts(values, names), targets, classes, {}, names, tokenizer=tokenizer, length=length
    )
    made.parts = {
        part: torch.tensor([place for place, one in enumerate(asked) if one == part]) for part in dict.fromkeys(asked)
    }
    return made


def _texts(values: Sequence[object], names: Sequence[str]) -> list[str]:
    strange = next((place for place, value in enumerate(values) if not isinstance(value, str | None)), None)
    if strange is not None:
        raise DataError(f"{names[strange]}: must be a text, got {values[strange]!r}")
    return [value or "" for value in values if isinstance(value, str | None)]
