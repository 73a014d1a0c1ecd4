"""Tables of texts and labels: a CSV, or parquet shards as on the hub."""

from collections.abc import Sequence
from pathlib import Path

from fastmeta.data.readers.csv_table import TABLES, has_columns, labels_and_parts, read_rows
from fastmeta.data.readers.names import base_name
from fastmeta.data.readers.parquet import IMAGES, columns_of, labeled_shards
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
        texts = [text or "" for column in columns for text in column]
    return Texts(base_name(path), texts, targets, classes, parts, names, tokenizer=tokenizer, length=length)
