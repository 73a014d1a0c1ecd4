"""Weak augmentation: what moves an image without changing what it shows."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastmeta.data.augment.affine import mirrored, warp
from fastmeta.data.augment.apply import view
from fastmeta.data.augment.augmentation import Augmentation
from fastmeta.data.augment.crop import crop
from fastmeta.data.augment.pixels import centre, taken, to_bytes, to_canvas
from fastmeta.data.random_numbers import KeyedRandom


@dataclass(frozen=True)
class Shift:
    """Shift by a whole number of pixels either way, and perhaps exchange left and right.

    Args:
        size: side of the result; images of another size are brought to it first.
        pixels: largest shift.
        padding: what moves in, "zeros" or the image "reflected" at its border.
        flip: exchange left and right of every second image.

    Raises:
        ValueError: ``pixels`` do not lie between 0 and ``size - 1``.

    >>> images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    >>> Shift(32, 4, "reflected", flip=True)(images, KeyedRandom(0, "labeled", "weak", torch.arange(4))).dtype
    torch.float32
    """

    size: int
    pixels: int
    padding: Literal["zeros", "reflected"] = "zeros"
    flip: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.pixels < self.size:
            raise ValueError(f"pixels must lie between 0 and size - 1 = {self.size - 1}, got {self.pixels}")

    def __call__(self, images: Tensor, random: KeyedRandom) -> Tensor:
        """Of ``[n, channels, height, width]`` in [0, 1] or uint8: ``[n, channels, size, size]`` float32 in [0, 1]."""
        images, moves = self.moves(images, random)
        return view(images, moves, reflected=self.reflected)

    @property
    def reflected(self) -> bool:
        """Whether the image is mirrored at its border."""
        return self.padding == "reflected"

    def moves(self, images: Tensor, random: KeyedRandom) -> tuple[Tensor, Tensor]:
        """The images of the right size, and by how many rows and columns each moves and whether it is flipped."""
        if images.shape[-2:] != (self.size, self.size):
            images = centre(images, self.size)
        drawn = random.uniform(3).to(images.device)
        moves = (drawn * (2 * self.pixels + 1)).to(torch.int32).sub_(self.pixels)
        moves[:, 2] = (drawn[:, 2] < 0.5) & self.flip
        return images, moves


def started(weak: Augmentation, images: Tensor, random: KeyedRandom) -> tuple[Tensor, Tensor | None, bool]:
    """The weak view, for :func:`fastmeta.data.augment.apply.view`: a shift is left to that, a crop is of 8 bits."""
    if isinstance(weak, Shift):
        return *weak.moves(images, random), weak.reflected
    if isinstance(weak, RandomCrop):
        return weak.cropped(images, random, unit=False), None, False
    return weak(images, random), None, False


@dataclass(frozen=True)
class RandomCrop:
    """A random rectangle of the picture, resized to a square, and perhaps with left and right exchanged.

    Its area is a uniform share of the picture's, the logarithm of its aspect ratio is uniform, and a side that would be
    longer than the picture's is cut to that.

    Args:
        size: side of the result.
        area: smallest and largest share of the picture.
        ratio: width to height, smallest and largest.
        flip: exchange left and right of every second one.

    >>> images = torch.zeros(4, 3, 256, 256, dtype=torch.uint8)
    >>> RandomCrop(224)(images, KeyedRandom(0, "labeled", "weak", torch.arange(4))).shape
    torch.Size([4, 3, 224, 224])
    """

    size: int
    area: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True

    def __call__(self, images: Tensor, random: KeyedRandom) -> Tensor:
        """Of ``[n, channels, height, width]`` in [0, 1] or uint8: ``[n, channels, size, size]`` float32 in [0, 1]."""
        return self.cropped(images, random, unit=True)

    def cropped(self, images: Tensor, random: KeyedRandom, *, unit: bool) -> Tensor:
        """The crops, as float32 in [0, 1] or, not ``unit``, as uint8."""
        canvas = to_canvas(images, self.size)
        maps = self.maps(canvas, random)
        if canvas.dtype == torch.uint8:
            return crop(canvas, maps[:, :, 2], maps[:, :, :2].diagonal(dim1=1, dim2=2), self.size, unit=unit)
        result = warp(canvas, maps, (self.size, self.size), fill=None).clamp_(0, 1)
        return result if unit else to_bytes(result)

    def maps(self, images: Tensor, random: KeyedRandom) -> Tensor:
        """From places in the result to places in the picture. ``[n, 2, 3]``."""
        drawn = random.uniform(5).to(images.device)
        height, width = images.shape[-2:]
        area = self.area[0] + (self.area[1] - self.area[0]) * drawn[:, 0]
        low, high = (math.log(end) for end in self.ratio)
        ratio = (low + (high - low) * drawn[:, 1].double()).exp()
        share = torch.stack([(area * ratio * height / width).sqrt(), (area / ratio * width / height).sqrt()], dim=1)
        share = share.float().clamp_(max=1)  # [n, 2], of width and height
        middle = (2 * drawn[:, 2:4] - 1) * (1 - share)
        maps = torch.cat([torch.diag_embed(share), middle.unsqueeze(2)], dim=2)
        return mirrored(maps, drawn[:, 4] < 0.5) if self.flip else maps


def weak_augment(images: Tensor, generator: torch.Generator, *, max_shift: int = 1) -> Tensor:
    """Shift every image by a whole number of pixels, up to ``max_shift`` either way; what moves in is 0.

    For loops of one's own: shifts come from a generator; :class:`Shift` keys them by example.

    Args:
        images: ``[N, channels, height, width]``.
        generator: source of randomness, on the CPU.
        max_shift: pixels.

    Returns:
        ``[N, channels, height, width]``.

    >>> weak_augment(torch.ones(3, 1, 8, 8), torch.Generator().manual_seed(0)).shape
    torch.Size([3, 1, 8, 8])
    """
    count, _, height, width = images.shape
    shift = torch.randint(-max_shift, max_shift + 1, (2, count, 1), generator=generator).to(images.device)
    rows = shift[0] + torch.arange(height, device=images.device)
    columns = shift[1] + torch.arange(width, device=images.device)
    return taken(images, rows, columns, reflected=False)
