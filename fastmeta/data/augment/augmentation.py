"""What an augmentation is."""

from typing import Protocol

from torch import Tensor

from fastmeta.data.random_numbers import KeyedRandom


class Augmentation(Protocol):
    """``[n, channels, height, width]``, uint8 or in [0, 1], to ``[n, channels, size, size]`` float32 in [0, 1]."""

    def __call__(self, images: Tensor, random: KeyedRandom) -> Tensor:
        """The views, one an image."""
        ...


class PlainView(Protocol):
    """The same of an image as evaluation sees it, of which nothing is drawn."""

    def __call__(self, images: Tensor) -> Tensor:
        """The images, of the size that the net takes."""
        ...
