"""What a run looks at: images, their classes and their official parts, wherever they are stored."""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

PARTS = ("train", "unlabeled", "validation", "test")


class DataError(ValueError):
    """The data cannot be trained on as they are; the text says what to change."""


class UnreadableImage(DataError):
    """One image that cannot be read.

    Args:
        place: its place in the whole.
        description: its path.
        cause: why.
    """

    def __init__(self, place: int, description: str, cause: str) -> None:
        super().__init__(place, description, cause)  # what pickles: it comes out of workers
        self.place, self.description, self.cause = place, description, cause

    def __str__(self) -> str:
        return f"{self.description}: {self.cause}"


class Images(Protocol):
    """All images of a run in one numbering ``0 .. M - 1``: those for training, validation and test alike.

    Attributes:
        name: what reports call it.
        classes: the names of the classes.
        targets: ``[M]``, int64; -1 where there is no label.
        parts: official parts, places ``[.]`` int64, by names of :data:`PARTS`; ``{"train": all}`` where there are none.
        image_shape: ``(channels, height, width)`` of what :meth:`get` returns.
        fingerprint: of names, sizes and labels, for the record of a run.
    """

    name: str
    classes: tuple[str, ...]
    targets: Tensor
    parts: Mapping[str, Tensor]
    image_shape: tuple[int, ...]
    fingerprint: str

    def __len__(self) -> int: ...

    def get(self, places: Tensor) -> Tensor:
        """The images at ``places [n]``: ``[n, channels, height, width]``, uint8 or float32 in [0, 1], on the CPU.

        Raises:
            UnreadableImage: the first that cannot be read.
        """
        ...

    def describe(self, place: int) -> str:
        """Path or number of an image, as reports name it."""
        ...


def fingerprint_of(*parts: object) -> str:
    """A short hexadecimal digest of what is given.

    >>> fingerprint_of("digits", 1797) == fingerprint_of("digits", 1797) != fingerprint_of("digits", 1796)
    True
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part.numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()


class ImageDataset:
    """Images with their classes, in memory.

    Args:
        name: what reports call it.
        images: ``[M, channels, height, width]``: uint8, or floating point in [0, 1].
        targets: ``[M]``, int64 classes; -1 where there is no label.
        classes: the names of the classes, or how many there are.
        parts: official parts by name, places ``[.]`` int64; None: everything is "train".
        names: of the images; None: ``name[place]``.

    Raises:
        ValueError: the shapes, dtypes or ranges are not these.

    >>> ImageDataset("two", torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]), 2).image_shape
    (1, 8, 8)
    """

    def __init__(
        self,
        name: str,
        images: Tensor,
        targets: Tensor,
        classes: int | tuple[str, ...],
        parts: Mapping[str, Tensor] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        if images.dim() != 4 or not (images.is_floating_point() or images.dtype == torch.uint8):
            raise ValueError(
                f"images must be uint8 or floating point [M, channels, height, width], got {images.dtype} "
                f"{list(images.shape)}"
            )
        if targets.dtype != torch.int64 or targets.shape != images.shape[:1]:
            raise ValueError(f"targets must be int64 [{images.shape[0]}], got {targets.dtype} {list(targets.shape)}")
        self.name, self.images, self.targets, self._names = name, images, targets, names
        self.classes = tuple(map(str, range(classes))) if isinstance(classes, int) else classes
        if len(targets) and not -1 <= int(targets.min()) <= int(targets.max()) < len(self.classes):
            raise ValueError(
                f"targets must lie in [0, {len(self.classes)}), or be -1 where there is no label, got "
                f"{int(targets.min())} to {int(targets.max())}"
            )
        self.parts: Mapping[str, Tensor] = {"train": torch.arange(len(targets))} if parts is None else dict(parts)
        for part, places in self.parts.items():
            if part not in PARTS:
                raise ValueError(f"parts must be among {', '.join(PARTS)}, got {part!r}")
            if len(places) and not 0 <= int(places.min()) <= int(places.max()) < len(targets):
                raise ValueError(f"parts must hold places in [0, {len(targets)}), got {part} up to {int(places.max())}")
        self.image_shape: tuple[int, ...] = tuple(images.shape[1:])
        self.fingerprint = fingerprint_of(name, self.classes, tuple(images.shape), targets)

    def __len__(self) -> int:
        return len(self.targets)

    @functools.cached_property
    def stamp(self) -> str:
        """Of the pixels: what is kept of images in memory is found again by it."""
        return fingerprint_of(self.images.contiguous())

    def get(self, places: Tensor) -> Tensor:
        """``[n, channels, height, width]``."""
        return self.images[places]

    def describe(self, place: int) -> str:
        """``digits[17]``."""
        return f"{self.name}[{place}]" if self._names is None else self._names[place]
