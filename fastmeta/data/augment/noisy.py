"""Gaussian noise on the pixels of a view."""

from dataclasses import dataclass

from torch import Tensor

from fastmeta.data.augment.augmentation import Augmentation
from fastmeta.data.augment.pixels import noise
from fastmeta.data.random_numbers import KeyedRandom


@dataclass(frozen=True)
class Noisy:
    """A view plus Gaussian noise, each pixel its own; what comes out may lie beyond [0, 1].

    Args:
        view: the augmentation.
        deviation: standard deviation of the noise.

    >>> import torch
    >>> from fastmeta.data.augment import Shift
    >>> images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    >>> Noisy(Shift(32, 2), 0.15)(images, KeyedRandom(0, "labeled", "weak", torch.arange(4))).shape
    torch.Size([4, 3, 32, 32])
    """

    view: Augmentation
    deviation: float

    def __call__(self, images: Tensor, random: KeyedRandom) -> Tensor:
        """Of ``[n, channels, height, width]``: ``[n, channels, size, size]`` float32."""
        views = self.view(images, random)
        return views + self.deviation * noise(views.shape, random.uniform(1)[:, 0].to(views.device))
