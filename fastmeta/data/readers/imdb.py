"""The Large Movie Review data set (Maas et al., 2011): a file a review."""

from pathlib import Path

import torch

from fastmeta.data.images import DataError
from fastmeta.data.text import Texts, tokenize, trained_tokenizer

_URL = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
_CLASSES = ("neg", "pos")
_LENGTH, _VOCABULARY = 128, 8000


def imdb_below(path: Path) -> Path | None:
    """The folder with the reviews, at a path or in ``aclImdb`` there."""
    return next((folder for folder in (path, path / "aclImdb") if any((folder / "train" / "pos").glob("*.txt"))), None)


def open_imdb(path: Path, length: int | None = None) -> Texts:
    """Reviews below ``train/pos``, ``train/neg``, ``test/pos`` and ``test/neg``, and ``train/unsup`` without labels.

    The tokenizer is trained on those of ``train``, unlabeled ones among them.

    Args:
        path: the folder, unpacked.
        length: L, tokens of a review; the last ones are kept. None: 128, as published.

    Raises:
        DataError: there are no reviews, a folder is missing, or a file is no text.
        MissingPackage: tokenizers is not installed.
        ValueError: the length is less than 3.
    """
    length = length or _LENGTH
    if length < 3:
        raise ValueError(f"image_size must be at least 3 tokens, of which two are special, got {length}")
    folder = imdb_below(path)
    if folder is None:
        raise DataError(f"{path}: no imdb found, expected train/pos/*.txt and the like; unpack {_URL}")
    texts: list[str] = []
    names: list[str] = []
    targets: list[int] = []
    parts: dict[str, list[int]] = {"train": [], "unlabeled": [], "test": []}
    for below, part in (("train", "train"), ("test", "test"), ("train/unsup", "unlabeled")):
        for label, name in ((-1, ""),) if part == "unlabeled" else enumerate(_CLASSES):
            files = sorted((folder / below / name).glob("*.txt"))
            if not files and part != "unlabeled":
                raise DataError(f"{folder}: imdb without {below}/{name}/*.txt; unpack {_URL}")
            parts[part] += range(len(texts), len(texts) + len(files))
            targets += [label] * len(files)
            names += [file.relative_to(folder).as_posix() for file in files]
            texts += [_read(file) for file in files]
    read = [text for text, name in zip(texts, names, strict=True) if name.startswith("train")]
    tokenizer = trained_tokenizer(read, _VOCABULARY)
    return Texts(
        "imdb",
        tokenize(tokenizer, texts, length),
        tokenizer.get_vocab_size(),
        torch.tensor(targets),
        _CLASSES,
        {part: torch.tensor(places, dtype=torch.int64) for part, places in parts.items() if places},
        names,
    )


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").replace("<br />", " ")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
