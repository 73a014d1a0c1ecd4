"""Folders of pictures, a folder a class, and plain lists of files."""

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from fastmeta.data.images import DataError, fingerprint_of
from fastmeta.data.readers.collection import Collection
from fastmeta.data.readers.labels import PART_NAMES, checked_parts, class_name, shown
from fastmeta.data.readers.names import Names, base_name
from fastmeta.data.readers.pictures import SUFFIXES

_UNREAD = frozenset({".heic", ".heif", ".dng", ".cr2", ".nef", ".arw", ".svg", ".psd"})  # pictures, but not to Pillow
_MISSING = -1  # size of a file that is not there: a link to nowhere


@dataclass(frozen=True)
class File:
    """A picture's file.

    Args:
        path: below the root.
        size: bytes.
        time: of the last change, nanoseconds.
    """

    path: str
    size: int
    time: int


@dataclass(frozen=True)
class OpenFile:
    """Opens pictures by their paths."""

    names: Sequence[str]

    def __call__(self, place: int) -> Image.Image:
        """The picture of a file."""
        return Image.open(self.names[place])


def collect_folder(root: Path) -> Collection:
    """The pictures below ``root``: ``train/<class>/...``, and ``unlabeled/``, ``val/`` and ``test/`` where they exist.

    Without ``train``, the folders of ``root`` that are no part are the classes of "train". A class's folder may have
    folders; links are followed; hidden files and files of other kinds are passed over. ``unlabeled`` holds pictures in
    any folders: where each is in one named as a class, that is the truth which reports compare with.

    Raises:
        DataError: a class has no pictures, a picture is in no class's folder, a class is not in ``train``, or two
            folders are one part.
    """
    parts: dict[str, Path] = {}
    for entry in _entries(root):
        part = PART_NAMES.get(entry.name.lower())
        if part and entry.is_dir():
            if part in parts:
                raise DataError(
                    f"{root}: {parts[part].name} and {entry.name} are one part, {part}: expected one of them"
                )
            parts[part] = Path(entry.path)
    train = _classes_below(root, parts.get("train", root), parts)
    classes = tuple(sorted(train))
    if not classes:
        raise DataError(f"{root}: no images found, expected train/<class>/ or <class>/ with {_kinds()} files")
    files: list[File] = []
    targets: list[int] = []
    places: dict[str, torch.Tensor] = {}
    for part in ("train", "unlabeled", "validation", "test"):
        start = len(files)
        if part == "train":
            labeled = train
        elif part not in parts:
            continue
        elif part == "unlabeled":
            labeled = _unlabeled(root, parts[part], classes)
        else:
            labeled = _classes_below(root, parts[part], {})
            foreign = sorted(set(labeled) - set(classes))
            if foreign:
                raise DataError(f"{parts[part]}: {shown(foreign)}: no class of train, expected {shown(classes)}")
        for name, found in sorted(labeled.items()):
            files += found
            targets += [classes.index(name) if name in classes else -1] * len(found)
        places[part] = torch.arange(start, len(files))
    return _collection(root, base_name(root), files, classes, torch.tensor(targets, dtype=torch.int64), places)


def collect_files(paths: Sequence[Path]) -> Collection:
    """Pictures without labels: these files, and all that are in these folders.

    Raises:
        DataError: there are none, or a path does not exist.

    >>> collect_files([])
    Traceback (most recent call last):
    fastmeta.data.images.DataError: no images found, expected files or folders of pictures
    """
    files: list[File] = []
    root = Path(os.path.abspath(os.sep))
    for path in (path.absolute() for path in paths):
        if path.is_dir():
            files += pictures_below(root, path)
        elif path.exists():
            status = path.stat()
            files.append(File(str(path.relative_to(root)), status.st_size, status.st_mtime_ns))
        else:
            raise DataError(f"{path}: no such file or folder")
    if not files:
        raise DataError("no images found, expected files or folders of pictures")
    targets = torch.full((len(files),), -1)
    return _collection(root, base_name(paths[0]), files, (), targets, {"unlabeled": torch.arange(len(files))})


def _collection(
    root: Path,
    name: str,
    files: Sequence[File],
    classes: tuple[str, ...],
    targets: torch.Tensor,
    places: dict[str, torch.Tensor],
) -> Collection:
    names = Names((file.path for file in files), os.path.join(root.absolute(), ""))
    parts = places if not classes else checked_parts(name, classes, targets, places, names.__getitem__)
    sizes = torch.tensor([file.size for file in files], dtype=torch.int64)
    times = torch.tensor([file.time for file in files], dtype=torch.int64)
    fingerprint = fingerprint_of(classes, names.digest(), sizes, targets)
    stamp = fingerprint_of(str(root.absolute()), names.digest(), sizes, times)
    return Collection(name, classes, targets, parts, names, OpenFile(names), fingerprint, stamp)


def _classes_below(root: Path, folder: Path, parts: dict[str, Path]) -> dict[str, list[File]]:
    """The pictures of each class, a folder below ``folder`` that is no part."""
    loose = [os.path.basename(file.path) for file in pictures_below(root, folder, deep=False)]
    if loose:
        raise DataError(
            f"{folder}: {shown(loose)}: in no class's folder, expected {folder.name}/<class>/{loose[0]}, or the folder "
            "unlabeled for pictures without a class"
        )
    found: dict[str, list[File]] = {}
    for entry in _entries(folder):
        if entry.is_dir() and Path(entry.path) not in parts.values():
            inside = list(pictures_below(root, Path(entry.path)))
            if not inside:
                raise DataError(f"{entry.path}: class {entry.name} has no pictures, expected {_kinds()} files")
            found.setdefault(class_name(entry.name), []).extend(inside)
    return found


def _unlabeled(root: Path, folder: Path, classes: tuple[str, ...]) -> dict[str, list[File]]:
    names = {class_name(entry.name) for entry in _entries(folder) if entry.is_dir()}
    if names <= set(classes) and not any(pictures_below(root, folder, deep=False)):
        return _classes_below(root, folder, {})
    return {"": list(pictures_below(root, folder))}


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """What is in a folder, in order, but for what computers put there on their own."""
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if not e.name.startswith((".", "__MACOSX"))), key=lambda entry: entry.name)


def pictures_below(root: Path, folder: Path, deep: bool = True) -> Iterator[File]:
    """The pictures in a folder below ``root`` and, if ``deep``, in those inside it; other kinds are warned of."""
    unread: Counter[str] = Counter()
    below = os.path.join(folder.relative_to(root), "") if folder != root else ""
    yield from _walk(str(folder), below, deep, unread, frozenset())
    if unread and deep:
        counted = ", ".join(f"{count} {suffix}" for suffix, count in sorted(unread.items()))
        warnings.warn(f"{folder}: {counted} files are not read, save them as {_kinds()}", stacklevel=2)


def _walk(
    folder: str, below: str, deep: bool, unread: Counter[str], above: frozenset[tuple[int, int]]
) -> Iterator[File]:
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:  # a link back up
        return
    for entry in _entries(folder):
        path = below + entry.name
        suffix = os.path.splitext(entry.name)[1].lower()
        if entry.is_dir():
            if deep:
                yield from _walk(entry.path, path + os.sep, deep, unread, above | {here})
        elif suffix in SUFFIXES:
            try:
                status = entry.stat()
                yield File(path, status.st_size, status.st_mtime_ns)
            except FileNotFoundError:
                yield File(path, _MISSING, 0)
        elif suffix in _UNREAD:
            unread[suffix] += 1


def _kinds() -> str:
    return "jpg, png, webp, tif, ..."
