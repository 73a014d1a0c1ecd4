"""The views of an image that a run uses, by name."""

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from torch import Tensor

from fastmeta.data.augment.pictures import StrongPicture
from fastmeta.data.augment.pixels import centre, to_unit
from fastmeta.data.augment.strong import StrongAugment
from fastmeta.data.augment.weak import RandomCrop, Shift
from fastmeta.data.random_numbers import KeyedRandom
from fastmeta.data.readers.pictures import SMALL

ViewsName = Literal["auto", "digits", "pictures", "none"]
LARGEST_DRAWING = 32  # "auto" takes smaller gray images for drawings or writing


class Augmentation(Protocol):
    """``[n, channels, height, width]``, uint8 or in [0, 1], to ``[n, channels, size, size]`` float32 in [0, 1]."""

    def __call__(self, images: Tensor, random: KeyedRandom) -> Tensor:
        """The views, one an image."""
        ...


@dataclass(frozen=True)
class Plain:
    """The middle of the image, as evaluation sees it."""

    size: int

    def __call__(self, images: Tensor, random: KeyedRandom | None = None) -> Tensor:
        """Of ``[n, channels, height, width]`` in [0, 1] or uint8: ``[n, channels, size, size]`` float32 in [0, 1]."""
        return to_unit(centre(images, self.size))


@dataclass(frozen=True)
class Views:
    """Weak and strong augmentation, and the image as it is."""

    weak: Augmentation
    strong: Augmentation
    plain: Plain


def views_for(name: ViewsName, image_shape: tuple[int, ...], image_size: int) -> Views:
    """The views that suit images of a kind.

    - ``digits``: weak shifts by a pixel, strong distorts, shades and cuts out; nothing is flipped.
    - ``pictures``, up to 96 pixels: weak flips and shifts by up to an eighth; strong flips, draws two RandAugment-style
      operations and cuts out. Larger ones: the same of a random crop.
    - ``none``: the images as they are.
    - ``auto``: ``digits`` for gray images of up to 32 pixels, else ``pictures``.

    Args:
        name: one of these.
        image_shape: ``(channels, height, width)`` of what is stored.
        image_size: side of what the network sees.

    Raises:
        ValueError: ``name`` is none of these, or ``image_size`` is less than 2.

    >>> views_for("auto", (3, 32, 32), 32).weak
    Shift(size=32, pixels=4, padding='reflected', flip=True)
    """
    if name not in get_args(ViewsName):
        raise ValueError(f"views must be one of {', '.join(get_args(ViewsName))}, got {name!r}")
    if image_size < 2:
        raise ValueError(f"image_size must be at least 2, got {image_size}")
    if name == "auto":
        name = "digits" if image_shape[0] == 1 and image_size <= LARGEST_DRAWING else "pictures"
    plain = Plain(image_size)
    if name == "none":
        return Views(plain, plain, plain)
    if name == "digits":
        return Views(Shift(image_size, 1), StrongAugment(image_size), plain)
    if image_size > SMALL:
        crop = RandomCrop(image_size)
        return Views(crop, StrongPicture(image_size, crop=crop), plain)
    return Views(Shift(image_size, max(1, image_size // 8), "reflected", flip=True), StrongPicture(image_size), plain)
