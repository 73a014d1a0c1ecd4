"""The Large Movie Review data set (Maas et al., 2011): a file a review."""

import tarfile
import zlib
from pathlib import Path

import torch

from fastmeta.data.images import DataError
from fastmeta.data.text import Texts

_ARCHIVE = "aclImdb_v1.tar.gz"
_URL = f"https://ai.stanford.edu/~amaas/data/sentiment/{_ARCHIVE}"
_CLASSES = ("neg", "pos")
_FOLDERS = {
    "train/neg": ("train", 0),
    "train/pos": ("train", 1),
    "test/neg": ("test", 0),
    "test/pos": ("test", 1),
    "train/unsup": ("unlabeled", -1),
}


def imdb_below(path: Path) -> Path | None:
    """The folder with the reviews, at a path or in ``aclImdb`` there, or the archive as downloaded."""
    for folder in (path, path / "aclImdb"):
        if any((folder / "train" / "pos").glob("*.txt")):
            others = {each.name for each in (folder / "train").iterdir() if each.is_dir()} - {"neg", "pos", "unsup"}
            return None if others else folder
    return next((file for file in (path, path / _ARCHIVE) if file.name == _ARCHIVE and file.is_file()), None)


def open_imdb(path: Path, length: int | None = None, tokenizer: str | None = None) -> Texts:
    """Reviews below ``train/pos``, ``train/neg``, ``test/pos`` and ``test/neg``, and ``train/unsup`` without labels.

    Args:
        path: the folder, or the archive.
        length: L, tokens of a review; the last ones are kept. None: 128, as published.
        tokenizer: as :class:`fastmeta.data.text.Texts` takes it.

    Raises:
        DataError: there are no reviews, a folder is missing, or a file is no text.
        MissingPackage: tokenizers is not installed.
        ValueError: the length is less than 3.
    """
    place = imdb_below(path)
    if place is None:
        raise DataError(f"{path}: no imdb found, expected train/pos/*.txt and the like, or {_ARCHIVE}; get {_URL}")
    found = _unpacked(place) if place.is_file() else _files(place)
    texts: list[str] = []
    names: list[str] = []
    targets: list[int] = []
    parts: dict[str, list[int]] = {}
    for below, (part, label) in _FOLDERS.items():
        reviews = found[below]
        if not reviews and part != "unlabeled":
            raise DataError(f"{place}: imdb without {below}/*.txt; get {_URL}")
        for name in sorted(reviews):
            parts.setdefault(part, []).append(len(texts))
            names.append(str(place.absolute() / below / name))
            texts.append(_text(reviews[name], names[-1]))
            targets.append(label)
    return Texts(
        "imdb",
        texts,
        torch.tensor(targets),
        _CLASSES,
        {part: torch.tensor(places) for part, places in parts.items()},
        names,
        tokenizer=tokenizer,
        length=length,
    )


def _files(folder: Path) -> dict[str, dict[str, bytes]]:
    """The content of each file by its folder and name."""
    try:
        return {below: {file.name: file.read_bytes() for file in (folder / below).glob("*.txt")} for below in _FOLDERS}
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error}") from error


def _unpacked(archive: Path) -> dict[str, dict[str, bytes]]:
    """The same of an archive."""
    found: dict[str, dict[str, bytes]] = {below: {} for below in _FOLDERS}
    try:
        with tarfile.open(archive, "r|gz") as file:
            for member in file:
                below, _, name = member.name.removeprefix("aclImdb/").rpartition("/")
                content = file.extractfile(member) if below in found and name.endswith(".txt") else None
                if content is not None:
                    found[below][name] = content.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{archive}: must be a whole archive: {error}; get {_URL}") from error
    return found


def _text(content: bytes, where: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: must be UTF-8 text: {error}") from error
