"""What the augmentations share: sizes, exact means, the cut-out square.

Every function gives a row the same bits whatever rows are beside it and however many threads work on them: sums are of
integers, and transcendental functions, whose vector and scalar forms may differ in the last bit, are taken in float64.
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional

from fastmeta.data.readers.pictures import canvas_of


def to_unit(images: Tensor) -> Tensor:
    """float32 in [0, 1], of uint8 or of what is in [0, 1] already."""
    if images.dtype == torch.uint8:
        return images.to(torch.float32).div_(255)
    return images.to(torch.float32)


def to_bytes(images: Tensor) -> Tensor:
    """uint8, of uint8 or of what is in [0, 1]: to the nearest of 255 steps."""
    return images if images.dtype == torch.uint8 else (images * 255).round_().to(torch.uint8)


def to_canvas(images: Tensor, size: int) -> Tensor:
    """Shrink or enlarge ``images`` so that their shorter side lies between ``size`` and the canvas' side.

    Resized ones are float32, the others as they were.
    """
    height, width = images.shape[-2:]
    shorter = min(height, width)
    side = min(max(shorter, size), canvas_of(size))
    if side == shorter or not len(images):
        return images
    shape = (round(height * side / shorter), round(width * side / shorter))
    resized = functional.interpolate(to_unit(images), shape, mode="bilinear", antialias=True, align_corners=False)
    return resized.clamp_(0, 1)


def centre(images: Tensor, size: int) -> Tensor:
    """The middle ``size`` by ``size`` of ``images``, on their canvas. ``[n, channels, size, size]``.

    >>> centre(torch.zeros(2, 3, 256, 320), 224).shape
    torch.Size([2, 3, 224, 224])
    """
    images = to_canvas(images, size)
    height, width = images.shape[-2:]
    if not len(images):
        return images.new_empty(0, images.shape[1], size, size)
    top, left = (height - size) // 2, (width - size) // 2
    return images[:, :, top : top + size, left : left + size].contiguous()


def taken(images: Tensor, rows: Tensor, columns: Tensor, *, reflected: bool) -> Tensor:
    """Pixels at ``rows [n, height]`` and ``columns [n, width]``; outside of the image it is mirrored, or 0."""
    _, channels, height, width = images.shape
    if reflected:
        rows = (height - 1) - ((height - 1) - rows.abs()).abs()  # -1 is 1, and height is height - 2
        columns = (width - 1) - ((width - 1) - columns.abs()).abs()
    else:
        images = functional.pad(images, (1, 1, 1, 1))
        rows, columns = (rows + 1).clamp_(0, height + 1), (columns + 1).clamp_(0, width + 1)
        width += 2
    flat = (rows.unsqueeze(2) * width + columns.unsqueeze(1)).flatten(1).unsqueeze(1)
    taken = images.flatten(2).gather(2, flat.expand(-1, channels, -1))
    return taken.unflatten(2, (rows.shape[1], columns.shape[1]))


def shifted(images: Tensor, moves: Tensor, *, reflected: bool) -> Tensor:
    """By ``moves [n, 3]``: rows, columns, and whether left and right are exchanged first."""
    height, width = images.shape[2:]
    down, right, flip = moves.long().unsqueeze(2).unbind(1)  # [n, 1]
    place = torch.arange(width, device=images.device)
    columns = torch.where(flip != 0, width - 1 - place, place)
    return taken(images, down + torch.arange(height, device=images.device), right + columns, reflected=reflected)


def gray(images: Tensor) -> Tensor:
    """Luma of three channels (ITU-R 601), else the mean of the channels. ``[n, 1, height, width]``."""
    if images.shape[1] == 1:
        return images
    weights = (0.299, 0.587, 0.114) if images.shape[1] == 3 else (1 / images.shape[1],) * images.shape[1]
    total = images[:, :1] * weights[0]
    for channel, weight in enumerate(weights[1:], start=1):
        total.add_(images[:, channel : channel + 1] * weight)
    return total


def mean_of(images: Tensor) -> Tensor:
    """Mean of each image, of values rounded to 12 bits, so that float32 sums of a row are exact. ``[n, 1, 1, 1]``."""
    rows = (images * 2**12).round_().sum(dim=3, keepdim=True)
    return rows.double().sum(dim=(1, 2, 3), keepdim=True).div_(2**12 * images.shape[1:].numel()).float()


def cut_(images: Tensor, corner: Tensor, fraction: float, value: float) -> Tensor:
    """Set a rectangle of each image, ``fraction`` of its sides, to ``value``, in place; it lies inside of the image.

    ``corner`` is ``[n, 2]`` in [0, 1): where the rectangle lies between first and last place.
    """
    height, width = images.shape[-2:]
    tall, wide = round(fraction * height), round(fraction * width)
    if tall == 0 or wide == 0:
        return images
    in_rows = _covered(corner[:, 0], height, tall).unsqueeze(2)
    in_columns = _covered(corner[:, 1], width, wide).unsqueeze(1)
    inside = (in_rows & in_columns).unsqueeze(1).to(images.dtype)
    return images.lerp_(constant((value,), images.device), inside)  # exact at 0 and 1, and faster than masked_fill_


def _covered(corner: Tensor, side: int, length: int) -> Tensor:
    """``[n, side]`` bool."""
    first = (corner * (side - length + 1)).long().unsqueeze(1)
    place = torch.arange(side, device=corner.device)
    return (place >= first) & (place < first + length)


@functools.lru_cache(maxsize=64)
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """``values`` on ``device``, copied there once."""
    return torch.tensor(values, device=device)


_OFFSETS = 2**18


@functools.lru_cache(maxsize=8)
def _noise_bank(length: int, device: torch.device) -> Tensor:
    return torch.randn(_OFFSETS + length, generator=torch.Generator().manual_seed(0)).to(device)


def noise(shape: torch.Size, offset: Tensor) -> Tensor:
    """Gaussian noise: stretches of one fixed sequence, which start at ``offset [n]`` in [0, 1) of 2^18 places.

    Drawing as many normal numbers as pixels costs ten times as much, and a generator has no key for each image.
    """
    length = shape[1:].numel()
    places = (offset * _OFFSETS).long()
    return _noise_bank(length, offset.device).unfold(0, length, 1)[places].view(shape)
