"""Encoded pictures one after another in a file of the cache, for sources that give them only with their neighbours.

A row of a parquet file is read with its row group, often a hundred pictures for one; in random order that costs more
than decoding. So the bytes are copied once, as they are.
"""

import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image
from tqdm import tqdm

from fastmeta.data.cache import cache_folder, stored
from fastmeta.data.images import fingerprint_of
from fastmeta.data.new_folder import flush, new_folder
from fastmeta.data.readers.collection import DecodedImages

_BYTES, _ENDS = "pictures.bin", "ends.npy"


@runtime_checkable
class Packed(Protocol):
    """An opener that reads neighbours, too, and can give a picture's bytes."""

    size: int  # bytes of all

    def content(self, place: int) -> bytes:
        """The picture's file, empty where there is none."""
        ...


class OpenUnpacked:
    """Opens the pictures in a file of many."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ends = np.load(folder / _ENDS)
        if (folder / _BYTES).stat().st_size != self._ends[-1]:
            raise ValueError(f"{folder / _BYTES} is cut off")
        self._file: int | None = None

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __call__(self, place: int) -> Image.Image:
        """The picture at a place."""
        if self._file is None:
            self._file = os.open(self._folder / _BYTES, os.O_RDONLY)
        start, end = self._ends[place : place + 2].tolist()
        if start == end:
            raise ValueError("there is no picture in this row")
        return Image.open(io.BytesIO(os.pread(self._file, end - start, start)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            os.close(self._file)  # type: ignore[arg-type]


def unpacked(images: DecodedImages) -> DecodedImages:
    """The same images; where their source gives neighbours only, from a copy in the cache, which is made first."""
    opener = images.collection.opener
    if not isinstance(opener, Packed):
        return images

    def write(folder: Path) -> None:
        with new_folder(folder) as unfinished:
            ends = np.zeros(len(images) + 1, np.int64)
            with open(unfinished / _BYTES, "wb") as file:
                for place in tqdm(range(len(images)), f"unpacking {images.name}, once", unit="images", disable=None):
                    ends[place + 1] = ends[place] + file.write(opener.content(place))
                flush(file)
            with open(unfinished / _ENDS, "wb") as file:
                np.save(file, ends)
                flush(file)

    def read(folder: Path) -> OpenUnpacked | None:
        try:
            found = OpenUnpacked(folder)
        except (OSError, ValueError, EOFError):
            return None
        return found if len(found) == len(images) else None

    folder = cache_folder() / f"{images.name}-{fingerprint_of(images.collection.stamp)}-pictures"
    found = stored(folder, opener.size, read, write)
    if found is None:
        return images
    return DecodedImages(replace(images.collection, opener=found), images.image_size, images.mode)
