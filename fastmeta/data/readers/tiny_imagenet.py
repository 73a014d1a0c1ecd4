"""Tiny ImageNet in Stanford's layout: the zip as downloaded, or what it unpacks to."""

import io
import os
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fastmeta.data.images import DataError, fingerprint_of
from fastmeta.data.readers.collection import Collection, Opener
from fastmeta.data.readers.folder import File, OpenFile, pictures_below
from fastmeta.data.readers.labels import checked_parts, class_name
from fastmeta.data.readers.names import Names
from fastmeta.data.readers.original import Original
from fastmeta.data.readers.shards import stamp_of

_FOLDER = "tiny-imagenet-200"
_NAME = "tiny-imagenet"
_TEXTS = _CLASSES, _ANNOTATIONS, _WORDS = ("wnids.txt", "val/val_annotations.txt", "words.txt")
_SUFFIX = ".JPEG"


class OpenZipped:
    """Opens the pictures in a zip file."""

    def __init__(self, archive: Path, names: Sequence[str]) -> None:
        self._archive, self._names = archive, names
        self._file: zipfile.ZipFile | None = None
        self._process = 0

    def __call__(self, place: int) -> Image.Image:
        """The picture of a member."""
        if self._file is None or self._process != os.getpid():  # forked ones would share the place in the file
            self._file, self._process = zipfile.ZipFile(self._archive), os.getpid()
        return Image.open(io.BytesIO(self._file.read(self._names[place])))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}


def _collect(place: Path) -> Collection:
    """``train/<class>/images/*.JPEG`` is "train"; ``val``, whose classes a file names, is "test".

    The test images of the archive have no labels and are left out: papers report on ``val``.

    Raises:
        DataError: a file is missing or damaged, or a picture of ``val`` is not annotated.
    """
    try:
        files, texts = _in_zip(place) if place.is_file() else _in_folder(place)
    except (OSError, zipfile.BadZipFile, KeyError, UnicodeDecodeError) as error:
        raise DataError(f"{place}: must be Tiny ImageNet, whole: {error}") from error
    number = {name: label for label, name in enumerate(texts[_CLASSES].split())}
    annotated = dict(line.split("\t")[:2] for line in texts[_ANNOTATIONS].splitlines())
    parts: dict[str, list[int]] = {"train": [], "test": []}
    kept: list[File] = []
    targets: list[int] = []
    for file in sorted(files, key=lambda one: one.path):  # in a zip they have any order
        folder, inside, name = *file.path.split("/", 2)[:2], file.path.rsplit("/", 1)[-1]
        if folder not in ("train", "val"):
            continue
        label = number.get(inside if folder == "train" else annotated.get(name, ""))
        if label is None:
            raise DataError(f"{place}: {file.path}: expected a class of {_CLASSES}, for val in {_ANNOTATIONS}")
        parts["train" if folder == "train" else "test"].append(len(kept))
        kept.append(file)
        targets.append(label)
    names = Names((file.path for file in kept), f"{_FOLDER}/" if place.is_file() else f"{place.absolute()}/")
    labels, classes = torch.tensor(targets, dtype=torch.int64), _class_names(list(number), texts[_WORDS])
    found = {part: torch.tensor(places, dtype=torch.int64) for part, places in parts.items()}
    found = checked_parts(_NAME, classes, labels, found, names.__getitem__)
    sizes = torch.tensor([file.size for file in kept], dtype=torch.int64)
    fingerprint = fingerprint_of(classes, names.digest(), sizes, labels)
    times = stamp_of([place]) if place.is_file() else [file.time for file in kept]
    stamp = fingerprint_of(str(place.absolute()), fingerprint, times)
    opener: Opener = OpenZipped(place, names) if place.is_file() else OpenFile(names)
    return Collection(_NAME, classes, labels, found, names, opener, fingerprint, stamp)


def _in_folder(root: Path) -> tuple[list[File], dict[str, str]]:
    files = [replace(file, path=Path(file.path).as_posix()) for file in pictures_below(root, root)]
    return files, {name: (root / name).read_text() for name in _TEXTS}


def _in_zip(archive: Path) -> tuple[list[File], dict[str, str]]:
    with zipfile.ZipFile(archive) as held:
        members = [member for member in held.infolist() if member.filename.endswith(_SUFFIX)]
        files = [File(member.filename.removeprefix(f"{_FOLDER}/"), member.file_size, 0) for member in members]
        return files, {name: held.read(f"{_FOLDER}/{name}").decode() for name in _TEXTS}


def _class_names(ids: list[str], words: str) -> tuple[str, ...]:
    """The first word for each class, with its WordNet number where two have the same."""
    word_of = dict(line.split("\t")[:2] for line in words.splitlines())
    first = [word_of.get(name, name).split(",")[0] for name in ids]
    counts = Counter(first)
    return tuple(
        class_name(word if counts[word] == 1 else f"{word} {name}") for word, name in zip(first, ids, strict=True)
    )


TINY_IMAGENET = Original(
    _NAME,
    200,
    _TEXTS,
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    collect=_collect,
    folders=(_FOLDER,),
    archives=("tiny-imagenet-200.zip",),
    md5={"tiny-imagenet-200.zip": "90528d7ca1a48142e341f4ef8d21d0de"},
)
