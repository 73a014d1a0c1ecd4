"""The definition of the operations, in PyTorch on any device: Pillow's arithmetic, to the bit.

Every function takes a batch and computes each image by itself. On the CPU it is given those whose operation it is; on a
GPU all of them, as nobody waits to hear which.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastmeta.data.augment.operations import CODES, OPERATIONS
from fastmeta.data.augment.pixels import constant

_TAPS = 7  # pixels that the widest filter takes
_BITS = 22  # of a filter's weights after the point


def apply_in_turn(
    images: Tensor,  # [N, C, H, W] uint8
    operations: Tensor,  # [N, D]
    levels: Tensor,  # [N, D]
    places: Tensor | None,  # [N, D, 2]; None: the middle
    fill: int,
    square: tuple[int, ...],
) -> Tensor:  # [N, C, H, W]
    """One operation after another: an image is 8 bits between any two."""
    middle = constant((images.shape[3] / 2, images.shape[2] / 2), images.device).expand(len(images), 2)
    for step in range(operations.shape[1]):
        code = operations[:, step]
        known = (code >= 0) & (code < len(OPERATIONS))
        code = torch.where(known, code, CODES["identity"])
        low = constant(tuple(float(each.low) for each in OPERATIONS.values()), images.device)[code]
        high = constant(tuple(float(each.high) for each in OPERATIONS.values()), images.device)[code]
        level = levels[:, step].nan_to_num(0.0).clamp(low, high).double()
        place = middle if places is None else places[:, step]
        images = _apply(images, code, level, place.double(), fill, square)
    return images


def _apply(
    images: Tensor, code: Tensor, level: Tensor, place: Tensor, fill: int, square: tuple[int, ...]
) -> Tensor:  # [N, C, H, W]
    def share(level: Tensor) -> Tensor:
        return level.float().view(-1, 1, 1, 1)

    changes: dict[tuple[str, ...], Callable[..., Tensor]] = {
        _BY_TABLE: lambda x, code, level, _: _look_up(x, _tables(x, code, level)),
        ("color",): lambda x, code, level, _: _blend(_luma(x), x, share(level)),
        ("sharpness",): lambda x, code, level, _: _blend(_smooth(x), x, share(level)),
        ("smooth",): lambda x, code, level, _: _blend(x, _smooth(x), share(level)),
        ("blur",): lambda x, code, level, _: _blend(x, _blur(x), share(level)),
        _GEOMETRIC: lambda x, code, level, _: _moved(x, _map(code, level, *x.shape[2:]), fill),
        _RESCALES: lambda x, code, level, _: _rescaled(x, code, level),
        ("cutout",): lambda x, code, level, place: _cut(x, level, place, square),
    }
    result = images
    for names, change in changes.items():
        mine = torch.zeros_like(code, dtype=torch.bool)
        for name in names:
            mine |= code == CODES[name]
        if not mine.is_cpu:
            result = torch.where(mine.view(-1, 1, 1, 1), change(images, code, level, place), result)
        elif len(rows := mine.nonzero().flatten()):
            result = result.index_copy(0, rows, change(*(each[rows] for each in (images, code, level, place))))
    return result


def _blend(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """``first + share (second - first)`` in float32, cut to [0, 255] and then to a whole number. ``Image.blend``."""
    start = first.to(torch.float32)
    return (start + share * (second.to(torch.float32) - start)).clamp_(0, 255).to(torch.uint8)


def _luma(images: Tensor) -> Tensor:
    """ITU-R 601 in integers. ``[N, 1, H, W]``; ``Image.convert("L")``."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.to(torch.int32).split(1, dim=1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).to(torch.uint8)


# Operations of a value by itself: a table of 256 numbers a channel.

_BY_TABLE = ("brightness", "contrast", "solarize", "posterize", "invert", "autocontrast", "equalize")


def _tables(images: Tensor, code: Tensor, level: Tensor) -> Tensor:
    """``[N, C, 256]`` uint8."""
    values = torch.arange(256, device=images.device)
    table = values.to(torch.uint8).expand(*images.shape[:2], 256)
    share = level.float().view(-1, 1, 1)
    kept = 256 - torch.pow(2, 8 - level.view(-1, 1, 1).long())
    made: dict[str, Callable[[], Tensor]] = {
        "brightness": lambda: _blend(torch.zeros_like(table), table, share),
        "contrast": lambda: _blend(_mean_luma(images), table, share),
        "solarize": lambda: torch.where(values < level.view(-1, 1, 1), table, 255 - table),
        "posterize": lambda: (values & kept).to(torch.uint8),
        "invert": lambda: _blend(table, 255 - table, share),
        "autocontrast": lambda: _blend(table, _stretched(images), share),
        "equalize": lambda: _blend(table, _equalized(images), share),
    }
    result = table
    for name in _BY_TABLE:
        mine = code == CODES[name]
        if not mine.is_cpu or bool(mine.any()):
            result = torch.where(mine.view(-1, 1, 1), made[name](), result)
    return result


def _look_up(images: Tensor, tables: Tensor) -> Tensor:
    return tables.gather(2, images.flatten(2).long()).view(images.shape)


def _mean_luma(images: Tensor) -> Tensor:
    """Mean of an image's luma as a whole number. ``[N, 1, 1]``."""
    luma = _luma(images).flatten(1)
    count = luma.shape[1]
    return ((2 * luma.sum(1, dtype=torch.int64) + count) // (2 * count)).view(-1, 1, 1)


def _stretched(images: Tensor) -> Tensor:
    """What takes the least value of each channel to 0 and the greatest to 255. ``[N, C, 256]``."""
    flat = images.flatten(2)
    low, high = flat.amin(2, keepdim=True).double(), flat.amax(2, keepdim=True).double()
    scale = torch.full_like(high, 255) / (high - low)  # a number / a tensor would be a product with 1 / tensor
    values = torch.arange(256, device=images.device, dtype=torch.float64)
    stretched = (values * scale + -low * scale).clamp_(0, 255)
    return torch.where(high > low, stretched, values).to(torch.uint8)


def _equalized(images: Tensor) -> Tensor:
    """What makes the histogram of each channel even. ``[N, C, 256]``."""
    flat = images.flatten(2).long()
    counts = torch.zeros(*flat.shape[:2], 256, dtype=torch.int64, device=images.device)
    counts.scatter_add_(2, flat, torch.ones_like(flat))
    of_the_greatest = counts.gather(2, flat.amax(2, keepdim=True))
    step = (flat.shape[2] - of_the_greatest) // 255
    below = counts.cumsum(2) - counts
    even = ((below + step // 2) // step.clamp(min=1)).clamp_(max=255)
    return torch.where(step > 0, even, torch.arange(256, device=images.device)).to(torch.uint8)


# Filters of neighbours. Their border, as wide as they reach, stays as it is; too small an image does as a whole.


def _smooth(images: Tensor) -> Tensor:
    """The mean of 3 x 3 pixels where the middle counts five times. ``ImageFilter.SMOOTH``."""
    return _filtered(images, 3, lambda sums, x: (2 * (sums(3) + 4 * x[..., 1:-1, 1:-1]) + 13) // 26)


def _blur(images: Tensor) -> Tensor:
    """The mean of the rim of 5 x 5 pixels. ``ImageFilter.BLUR``."""
    return _filtered(images, 5, lambda sums, x: (sums(5) - sums(3)[..., 1:-1, 1:-1] + 8) // 16)


def _filtered(
    images: Tensor, width: int, rule: Callable[[Callable[[int], Tensor], Tensor], Tensor]
) -> Tensor:  # [N, C, H, W]
    if min(images.shape[2:]) < width:
        return images
    x, reach = images.to(torch.int32), width // 2

    def sums(side: int) -> Tensor:
        """Of ``side`` by ``side`` pixels, wherever they fit."""
        return x.unfold(2, side, 1).sum(-1).unfold(3, side, 1).sum(-1)

    result = images.clone()
    result[..., reach:-reach, reach:-reach] = rule(sums, x).to(torch.uint8)
    return result


# One affine map for the five geometric operations, to the nearest pixel.

_GEOMETRIC = ("rotate", "shear-x", "shear-y", "translate-x", "translate-y")


def _map(code: Tensor, level: Tensor, height: int, width: int) -> Tensor:
    """``[N, 6]`` int64: pixel (x, y) shows what lay at (a x + b y + c, d x + e y + f) / 2^16."""

    def of(name: str) -> Tensor:
        return torch.where(code == CODES[name], level, 0.0)

    angle = -of("rotate") * (math.pi / 180)
    cosine, sine, shear_x, shear_y = angle.cos(), angle.sin(), of("shear-x"), of("shear-y")
    a, b, d, e = cosine, sine + shear_x, shear_y - sine, cosine
    # what turns, turns about the middle; half a pixel leads to a pixel's middle
    c = width / 2 - (cosine * (width / 2) + sine * (height / 2)) + 0.5 * a + 0.5 * b
    f = height / 2 - (cosine * (height / 2) - sine * (width / 2)) + 0.5 * d + 0.5 * e
    whole = torch.stack([a, b, c, d, e, f], dim=1).mul_(65536).add_(0.5).floor_().long()
    whole[:, 2] += (of("translate-x") + 0.5).floor().long() * 65536
    whole[:, 5] += (of("translate-y") + 0.5).floor().long() * 65536
    return whole


def _moved(images: Tensor, maps: Tensor, fill: int) -> Tensor:
    """Each image through its map; ``fill`` comes from outside."""
    height, width = images.shape[2:]
    x = torch.arange(width, device=images.device)
    y = torch.arange(height, device=images.device).view(-1, 1)
    a, b, c, d, e, f = maps.view(-1, 6, 1, 1).unbind(1)
    column, row = (a * x + b * y + c) >> 16, (d * x + e * y + f) >> 16  # [N, H, W]
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    place = (row * width + column).where(inside, 0).flatten(1).unsqueeze(1)
    found = images.flatten(2).gather(2, place.expand(-1, images.shape[1], -1)).view(images.shape)
    return torch.where(inside.unsqueeze(1), found, fill)


# Cut off the ends, enlarge the rest: weights of 22 bits along the rows, 8 bits, then along the columns.

_RESCALES = tuple(name for name in OPERATIONS if name.startswith("rescale-"))


def _rescaled(images: Tensor, code: Tensor, level: Tensor) -> Tensor:
    level = level.clamp(0, OPERATIONS["rescale-box"].high)  # that of another operation means another thing
    for axis in (3, 2):
        images = _enlarged(images.transpose(axis, 3), code, level).transpose(axis, 3)
    return images.contiguous()


def _enlarged(images: Tensor, code: Tensor, level: Tensor) -> Tensor:
    """Along the last axis."""
    side = images.shape[3]
    first = (level * side).round().long().unsqueeze(1)
    last = (side * (1 - level)).round().long().unsqueeze(1)
    scale = (last - first).double() / side
    kernels = {name: _KERNELS[name.removeprefix("rescale-")] for name in _RESCALES[:-1]}
    middle = (torch.arange(side, device=images.device) + 0.5) * scale  # [N, side]
    reach = torch.zeros_like(scale)
    for name, (support, _) in kernels.items():
        reach = torch.where(code.unsqueeze(1) == CODES[name], support, reach)
    begin = (middle - reach + 0.5).long().clamp_(min=0)
    end = torch.minimum((middle + reach + 0.5).long(), last - first)
    place = begin.unsqueeze(2) + torch.arange(_TAPS, device=images.device)  # [N, side, taps]
    offset = place - middle.unsqueeze(2) + 0.5
    weight = torch.zeros_like(offset)
    for name, (_, kernel) in kernels.items():
        weight = torch.where(code.view(-1, 1, 1) == CODES[name], kernel(offset), weight)
    weight = weight.where(place < end.unsqueeze(2), 0.0)
    weight = (weight / weight.sum(2, keepdim=True) * 2**_BITS).nan_to_num(0.0)
    whole = (weight + torch.where(weight < 0, -0.5, 0.5)).long()
    # nearest: one pixel, at a place that is added up
    nearest = torch.cat([scale * 0.5, scale.expand(-1, side - 1)], dim=1).cumsum(1).long()
    by_place = (code == CODES["rescale-nearest"]).view(-1, 1)
    place[:, :, 0] = torch.where(by_place, nearest, place[:, :, 0])
    whole[:, :, 0] = torch.where(by_place, 2**_BITS, whole[:, :, 0])
    whole[:, :, 1:] = whole[:, :, 1:].where(~by_place.unsqueeze(2), 0)
    place = (place + first.unsqueeze(2)).clamp_(max=side - 1).unsqueeze(1)  # [N, 1, side, taps]
    total = torch.full(images.shape, 1 << (_BITS - 1), dtype=torch.int64, device=images.device)
    for tap in range(_TAPS):
        pixel = images.gather(3, place[:, :, None, :, tap].expand(images.shape))
        total += pixel * whole[:, None, None, :, tap]
    return (total >> _BITS).clamp_(0, 255).to(torch.uint8)


def _sinc(x: Tensor) -> Tensor:
    angle = x * math.pi
    return torch.where(x == 0, 1.0, angle.sin() / angle)


def _bicubic(x: Tensor) -> Tensor:
    x = x.abs()
    outer = (((x - 5) * x + 8) * x - 4) * -0.5
    return torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, torch.where(x < 2, outer, 0.0))


def _hamming(x: Tensor) -> Tensor:
    low, high = (float(torch.tensor(value)) for value in (0.54, 0.46))  # Pillow has them in float32
    return torch.where(x.abs() < 1, _sinc(x) * (low + high * (x * math.pi).cos()), 0.0)


# How far a filter reaches, and its weight at a distance.
_KERNELS: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    "lanczos": (3.0, lambda x: torch.where((x >= -3) & (x < 3), _sinc(x) * _sinc(x / 3), 0.0)),
    "bicubic": (2.0, _bicubic),
    "bilinear": (1.0, lambda x: (1 - x.abs()).clamp(min=0)),
    "box": (0.5, lambda x: ((x > -0.5) & (x <= 0.5)).double()),
    "hamming": (1.0, _hamming),
}


def _cut(images: Tensor, side: Tensor, place: Tensor, square: tuple[int, ...]) -> Tensor:
    """A square about ``place``: the pixels whose centres lie inside."""
    inside = torch.ones(len(images), 1, 1, 1, dtype=torch.bool, device=images.device)
    for axis, shape in ((0, (-1, 1, 1, images.shape[3])), (1, (-1, 1, images.shape[2], 1))):
        pixel = torch.arange(images.shape[3 - axis], device=images.device)
        first, last = (torch.ceil(place[:, axis] + sign * side / 2 - 0.5).unsqueeze(1) for sign in (-1, 1))
        inside = inside & ((pixel >= first) & (pixel < last)).view(shape)
    color = constant(tuple(float(value) for value in square[: images.shape[1]]), images.device).to(torch.uint8)
    return torch.where(inside, color.view(-1, 1, 1), images)
