"""Images as one array on disk: nothing is decoded, and processes share what was read."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmeta.data.images import DataError, Images, UnreadableImage
from fastmeta.data.new_folder import flush, new_folder
from fastmeta.data.readers.labels import checked_parts
from fastmeta.data.readers.names import printable
from fastmeta.data.readers.shards import stamp_of

PIXELS = "images.npy"
INDEX = "index.json"
_FORMAT = "fastmeta images 1"
_CHUNK_BYTES = 16 * 2**20


class MappedImages:
    """Images in a folder's ``images.npy`` ``[M, channels, height, width]``, uint8 or float32, mapped into memory.

    Args:
        name: what reports call it.
        folder: with ``images.npy``.
        classes: the names of the classes.
        targets: ``[M]``, int64; -1 where there is no label.
        parts: official parts, places ``[.]``.
        names: of the images.
        fingerprint: of what the images were made from.
        unreadable: places that have no pixels, and why.
        stamp: of all that tells unchanged pixels.

    Raises:
        DataError: the array is no such array, or is cut off.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        classes: tuple[str, ...],
        targets: Tensor,
        parts: Mapping[str, Tensor],
        names: Sequence[str],
        fingerprint: str,
        unreadable: Mapping[int, str],
        stamp: str,
    ) -> None:
        self.name, self.classes, self.targets, self.fingerprint = name, classes, targets, fingerprint
        self.parts, self.unreadable, self.stamp = parts, unreadable, stamp
        self._names, self._path = names, folder / PIXELS
        self._pixels: np.ndarray | None = None
        pixels = self._mapped()
        if len(pixels) != len(targets):
            raise DataError(f"{self._path}: expected {len(targets)} images, got {len(pixels)}")
        self.image_shape: tuple[int, ...] = pixels.shape[1:]

    def __len__(self) -> int:
        return len(self.targets)

    def get(self, places: Tensor) -> Tensor:
        """``[n, channels, height, width]``, uint8 or float32."""
        if self.unreadable:
            for place in places.tolist():
                if place in self.unreadable:
                    raise UnreadableImage(place, self.describe(place), self.unreadable[place])
        return torch.from_numpy(self._mapped()[places.numpy()])

    def describe(self, place: int) -> str:
        """Path or number of the image that was stored."""
        return printable(self._names[place])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pixels": None}  # a process maps the file by itself

    def _mapped(self) -> np.ndarray:
        if self._pixels is None:
            try:
                pixels = np.load(self._path, mmap_mode="r", allow_pickle=False)
            except (ValueError, EOFError) as error:
                raise DataError(f"{self._path}: must be a whole array of images: {error}") from None
            if pixels.ndim != 4 or pixels.dtype not in (np.uint8, np.float32):
                shape = list(pixels.shape)
                raise DataError(
                    f"{self._path}: must be uint8 or float32 [M, channels, height, width], got {pixels.dtype} {shape}"
                )
            self._pixels = pixels.view(np.ndarray)
        return self._pixels


def open_memory_map(folder: Path) -> MappedImages:
    """A folder that :func:`save_images` wrote.

    Raises:
        DataError: the folder is not whole, or of another format.
    """
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index.get("format") != _FORMAT:
            raise DataError(f"{path}: format must be {_FORMAT!r}, got {index.get('format')!r}")
        targets = torch.tensor(index["targets"], dtype=torch.int64)
        parts = {part: torch.tensor(places, dtype=torch.int64) for part, places in index["parts"].items()}
        unreadable = {int(place): cause for place, cause in index["unreadable"].items()}
        name, classes, names = index["name"], tuple(index["classes"]), index["names"]
        parts = checked_parts(name, classes, targets, parts, names.__getitem__)
        stamp = stamp_of([folder / PIXELS])
        return MappedImages(name, folder, classes, targets, parts, names, index["fingerprint"], unreadable, stamp)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: must be an index that save_images wrote: {error!r}") from None


def save_images(images: Images, folder: str | Path) -> None:
    """Write images as a memory map: ``images.npy`` and ``index.json``; the folder appears when it is whole.

    Images that cannot be read are listed, and still cannot be read from there.

    Raises:
        OSError: it cannot be written, or ``folder`` is there and not empty.

    >>> import tempfile
    >>> from fastmeta.data import load_digits, open_images
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_images(load_digits(), folder + "/digits")
    ...     open_images(folder + "/digits").get(torch.arange(2)).shape
    torch.Size([2, 1, 8, 8])
    """
    places = torch.arange(len(images))
    size = max(1, _CHUNK_BYTES // max(1, int(np.prod(images.image_shape)) * 4))
    chunks = (read_chunk(images, chunk) for chunk in places.split(size))

    def index(unreadable: dict[int, str]) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "name": images.name,
            "classes": list(images.classes),
            "fingerprint": images.fingerprint,
            "unreadable": unreadable,
            "parts": {part: places.tolist() for part, places in images.parts.items()},
            "targets": images.targets.tolist(),
            "names": [images.describe(place) for place in range(len(images))],
        }

    write_map(Path(folder), (len(images), *images.image_shape), chunks, index)


Chunk = tuple[np.ndarray, dict[int, str]]  # pixels [n, channels, height, width]; places that have none, and why


def read_chunk(images: Images, places: Tensor) -> Chunk:
    """The images at ``places``, zeros for those that cannot be read, and these by place with the cause."""
    try:
        return images.get(places).numpy(), {}
    except UnreadableImage:
        pass
    read: dict[int, np.ndarray] = {}
    failed: dict[int, str] = {}
    for place in places.tolist():
        try:
            read[place] = images.get(torch.tensor([place]))[0].numpy()
        except UnreadableImage as error:
            failed[place] = error.cause
    nothing = np.zeros_like(next(iter(read.values()), np.zeros(images.image_shape, np.uint8)))
    return np.stack([read.get(place, nothing) for place in places.tolist()]), failed


def write_map(
    folder: Path, shape: tuple[int, ...], chunks: Iterable[Chunk], index: Callable[[dict[int, str]], dict[str, Any]]
) -> None:
    """Write the pixels of ``chunks`` and what ``index`` makes of the unreadable ones; all of it appears at once.

    Raises:
        OSError: it cannot be written, or ``folder`` is there and not empty; nothing is left behind.
    """
    unreadable: dict[int, str] = {}
    with new_folder(folder) as unfinished:
        with open(unfinished / PIXELS, "wb") as file:
            dtype = None
            for pixels, failed in chunks:
                unreadable |= failed
                if dtype is None:
                    dtype = pixels.dtype if pixels.dtype == np.uint8 else np.dtype(np.float32)
                    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(np.ascontiguousarray(pixels, dtype).data)
            flush(file)
        with open(unfinished / INDEX, "w", encoding="utf-8") as text:
            json.dump(index(unreadable), text, separators=(",", ":"))
            flush(text)
