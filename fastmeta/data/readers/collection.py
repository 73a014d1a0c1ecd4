"""Pictures that are decoded each time they are read, wherever their bytes are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fastmeta.data.images import DataError, UnreadableImage
from fastmeta.data.readers.names import printable
from fastmeta.data.readers.pictures import canvas_of, suitable_mode, suitable_size, to_canvas

_SAMPLE = 100  # pictures that sizes and colours are taken from


class Opener(Protocol):
    """Finds the picture at a place; it goes to worker processes, so it pickles."""

    def __call__(self, place: int) -> Image.Image:
        """The picture, its pixels not read yet."""
        ...


@dataclass(frozen=True)
class Collection:
    """What a reader found: names and labels of pictures, and how to open one.

    Args:
        name: what reports call it.
        classes: the names of the classes.
        targets: ``[M]``, int64; -1 where there is no label.
        parts: official parts, places ``[.]``.
        names: of the pictures.
        opener: of the picture at a place.
        fingerprint: of names, sizes and labels.
        stamp: of all that tells an unchanged source: where it is, names, sizes, times.
    """

    name: str
    classes: tuple[str, ...]
    targets: Tensor
    parts: Mapping[str, Tensor]
    names: Sequence[str]
    opener: Opener
    fingerprint: str
    stamp: str

    def __len__(self) -> int:
        return len(self.targets)


class DecodedImages:
    """The :class:`~fastmeta.data.Images` of a collection.

    Args:
        collection: of pictures.
        image_size: that training crops to; None: as suits a sample of the pictures.
        mode: Pillow's ``L`` or ``RGB``; None: gray where a sample of the pictures is gray. Others are converted.

    Raises:
        DataError: there are no pictures, or no picture of the sample can be read.
        ValueError: an argument is out of range.
    """

    def __init__(self, collection: Collection, image_size: int | None = None, mode: str | None = None) -> None:
        if image_size is not None and image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {image_size}")
        if mode not in (None, "L", "RGB"):
            raise ValueError(f"mode must be L (gray) or RGB, got {mode!r}")
        if not len(collection):
            raise DataError(f"{collection.name}: no images found")
        if image_size is None or mode is None:
            modes, sizes = _sampled(collection)
            image_size = suitable_size(sizes) if image_size is None else image_size
            mode = suitable_mode(modes) if mode is None else mode
        self.collection, self.image_size, self.mode = collection, image_size, mode
        self.canvas = canvas_of(image_size)
        self.name, self.classes, self.targets = collection.name, collection.classes, collection.targets
        self.parts, self.fingerprint, self.stamp = collection.parts, collection.fingerprint, collection.stamp
        self.image_shape: tuple[int, ...] = (1 if mode == "L" else 3, self.canvas, self.canvas)

    def __len__(self) -> int:
        return len(self.targets)

    def get(self, places: Tensor) -> Tensor:
        """``[n, channels, canvas, canvas]``, uint8."""
        pixels = np.empty((len(places), *self.image_shape), np.uint8)
        for row, place in enumerate(places.tolist()):
            pixels[row] = self._decode(place)
        return torch.from_numpy(pixels)

    def describe(self, place: int) -> str:
        """Path, or shard and row."""
        return printable(self.collection.names[place])

    def _decode(self, place: int) -> np.ndarray:
        try:
            with self.collection.opener(place) as picture:
                return to_canvas(picture, self.mode, self.canvas)
        except MemoryError:
            raise
        except Exception as error:  # a broken file may raise anything
            raise UnreadableImage(place, self.describe(place), _cause(error)) from error


def _sampled(collection: Collection) -> tuple[list[str], list[tuple[int, int]]]:
    modes, sizes, causes = [], [], []
    for place in torch.linspace(0, len(collection) - 1, min(len(collection), _SAMPLE)).long().tolist():
        try:
            with collection.opener(place) as picture:
                modes.append(picture.mode)
                sizes.append(picture.size)
        except Exception as error:  # a broken file may raise anything
            causes.append(f"{printable(collection.names[place])}: {_cause(error)}")
    if not sizes:
        raise DataError(f"{collection.name}: none of {len(causes)} pictures can be read, the first is {causes[0]}")
    return modes, sizes


def _cause(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no picture that Pillow can read"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]
