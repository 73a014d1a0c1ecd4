"""Published data sets in the files that their authors offer: where they are, what is missing, what is damaged."""

import gzip
import hashlib
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from fastmeta.data.cache import cache_folder, stored
from fastmeta.data.images import DataError, ImageDataset, fingerprint_of
from fastmeta.data.memory_map import MappedImages, open_memory_map, save_images
from fastmeta.data.readers.collection import Collection
from fastmeta.data.readers.shards import RowNames, places_of_parts, stamp_of

_FORMAT = 1  # of pixels in the cache: a change of what readers make of a file counts it up
_PACKED = ".gz"


@dataclass(frozen=True)
class Original:
    """One form of a data set.

    Args:
        name: of the data set.
        classes: C.
        files: all that it needs; the first tells this form from others. Each may have ``.gz`` at its end.
        url: where to get it.
        read: from the content of each file to images. Exactly one of this and ``collect`` is given.
        collect: from a folder with the files, or the archive, to pictures.
        folders: names of the folder that the files are in, below the one that is given.
        archives: names of the downloads that hold all of the files.
        md5: of downloads, official figures alone.
    """

    name: str
    classes: int
    files: tuple[str, ...]
    url: str
    read: Callable[[Mapping[str, bytes]], ImageDataset] | None = None
    collect: Callable[[Path], Collection] | None = None
    folders: tuple[str, ...] = ()
    archives: tuple[str, ...] = ()
    md5: Mapping[str, str] = field(default_factory=dict)

    def place(self, path: Path) -> Path | None:
        """The folder with the first of the files, or the archive, at a path or in a folder there."""
        if path.is_file():
            return path if path.name in self.archives else None
        for folder in (path, *(path / name for name in self.folders)):
            if _found(folder, self.files[0]) is not None:
                return folder
        return next((path / name for name in self.archives if (path / name).is_file()), None)

    def open(self, place: Path, *, cache: bool) -> ImageDataset | MappedImages | Collection:
        """What :meth:`place` found; images that need no decoding come from a memory map in the cache.

        Raises:
            DataError: a file is missing or damaged.
        """
        sources = {name: place if place.is_file() else _found(place, name) for name in self.files}
        missing = [name for name, source in sources.items() if source is None]
        if missing:
            raise DataError(f"{place}: {self.name} without {', '.join(missing)}; {self.how_to_get()}")
        paths = list(dict.fromkeys(source for source in sources.values() if source is not None))
        try:
            if self.collect is not None:
                return self.collect(place)
            return self._images(place, paths, cache)
        except DataError as error:
            raise DataError(f"{error}{self._wrong_sums(paths)}") from error

    def how_to_get(self) -> str:
        """What an error about missing files says."""
        expected = ", ".join(self.files)
        inside = f", there or in {' or '.join(self.folders)}" if self.folders else ""
        packed = f", or {' or '.join(self.archives)} as downloaded" if self.archives else ""
        sums = "; ".join(f"{name} {value}" for name, value in self.md5.items())
        return f"expected {expected}{inside}{packed}; get it from {self.url}" + (f" (MD5: {sums})" if sums else "")

    def _images(self, place: Path, paths: list[Path], cache: bool) -> ImageDataset | MappedImages:
        read = self.read
        assert read is not None
        made: list[ImageDataset] = []  # kept where the cache cannot be written

        def whole() -> ImageDataset:
            if not made:
                made.append(read(_Contents(place, self.files)))
            return made[0]

        def mapped(folder: Path) -> MappedImages | None:
            try:
                return open_memory_map(folder)
            except (OSError, DataError):
                return None

        if not cache:
            return whole()
        folder = cache_folder() / f"{self.name}-{fingerprint_of(_FORMAT, self.name, stamp_of(paths))}"
        size = sum(path.stat().st_size for path in paths)
        return stored(folder, size, mapped, lambda folder: save_images(whole(), folder)) or whole()

    def _wrong_sums(self, paths: list[Path]) -> str:
        """Which downloads are not the official ones; asked after an error, because it reads them whole."""
        for path in paths:
            expected = self.md5.get(path.name)
            if expected is not None and expected != (got := _md5(path)):
                return f"; {path.name} has MD5 {got} and the official one {expected}: get it again from {self.url}"
        return ""


class _Contents(Mapping[str, bytes]):
    """The bytes of files by their names, read when they are asked for; of an archive all at once."""

    def __init__(self, place: Path, names: tuple[str, ...]) -> None:
        self._place, self._names = place, names
        self._unpacked = _unpacked(place, names) if place.is_file() else None

    def __getitem__(self, name: str) -> bytes:
        if self._unpacked is not None:
            return self._unpacked[name]
        path = _found(self._place, name)
        if path is None:
            raise KeyError(name)
        try:
            content = path.read_bytes()
            return gzip.decompress(content) if path.suffix == _PACKED else content
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: cannot be read: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _found(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}{_PACKED}") if path.is_file()), None)


def _unpacked(archive: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    try:
        with gzip.open(archive) as packed:
            with tarfile.open(fileobj=packed, mode="r|") as file:
                for member in file:
                    name = member.name.rsplit("/", 1)[-1]
                    content = file.extractfile(member) if name in names and member.isfile() else None
                    if content is not None:
                        found[name] = content.read()
            while packed.read(2**20):  # to its end, where the sum is that gzip checks
                pass
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{archive}: must be a whole archive: {error}") from error
    missing = [name for name in names if name not in found]
    if missing:
        raise DataError(f"{archive}: {', '.join(missing)}: not in it")
    return found


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def train_and_test(
    name: str, classes: tuple[str, ...], pieces: Mapping[str, tuple[np.ndarray, np.ndarray]], parts: Mapping[str, str]
) -> ImageDataset:
    """The images of files, in their order.

    Args:
        name: of the data set.
        classes: their names.
        pieces: images ``[n, channels, height, width]`` uint8 and labels ``[n]`` by the name of their file.
        parts: the part that each file belongs to.

    Raises:
        DataError: a file has no images, another number of labels, or a label that is no class.
    """
    for file, (pixels, labels) in pieces.items():
        if not len(pixels) or labels.shape != pixels.shape[:1] or labels.dtype.kind not in "iu":
            raise DataError(
                f"{file}: expected images and a whole number for each, got {len(pixels)} images and labels "
                f"{labels.dtype} {list(labels.shape)}"
            )
        if not 0 <= labels.min() <= labels.max() < len(classes):
            raise DataError(f"{file}: labels must lie in [0, {len(classes)}), got {labels.min()} to {labels.max()}")
    counts = [len(labels) for _, labels in pieces.values()]
    return ImageDataset(
        name,
        torch.from_numpy(np.concatenate([pixels for pixels, _ in pieces.values()])),
        torch.from_numpy(np.concatenate([labels for _, labels in pieces.values()]).astype(np.int64)),
        classes,
        places_of_parts([parts[file] for file in pieces], counts),
        RowNames(list(pieces), counts),
    )
