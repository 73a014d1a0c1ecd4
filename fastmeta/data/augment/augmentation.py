"""What an augmentation is."""

from typing import Protocol

from torch import Tensor

from fastmeta.data.random_numbers import KeyedRandom


class Augmentation(Protocol):
    """``[n, channels, height, width]``, uint8 or in [0, 1], to ``[n, channels, size, size]`` float32 in [0, 1]."""

    def __call__(self, images: Tensor, random: KeyedRandom) -> Tensor:
        """The views, one an image."""
        ...
