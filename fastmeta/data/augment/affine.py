"""Affine maps, one an image: an image's geometric operations compose into one map and cost one resampling.

A map ``[n, 2, 3]`` takes a place in the result to its place in the source; both have x and y in [-1, 1] over the image.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from fastmeta.data.augment.pixels import to_unit


def affine_map(strengths: Mapping[str, Tensor]) -> Tensor:
    """Shears, then rotation and stretch, then a shift. ``[n, 2, 3]`` of strengths ``[n]``, 0 for what is not done.

    Shifts are fractions of the side, the rotation is in radians, shears are slopes and the stretch, which may be
    missing, is the logarithm of a factor.
    """
    angle = strengths["rotate"].double()
    cosine, sine = angle.cos(), angle.sin()
    if "stretch" in strengths:
        factor = strengths["stretch"].double().exp()
        cosine, sine = cosine * factor, sine * factor
    cosine, sine = cosine.float(), sine.float()
    shear_x, shear_y = strengths["shear_x"], strengths["shear_y"]
    # [[cosine, -sine], [sine, cosine]] @ [[1, shear_x], [shear_y, 1]]
    rows = (
        torch.stack([cosine - sine * shear_y, cosine * shear_x - sine, 2 * strengths["shift_x"]], dim=1),
        torch.stack([sine + cosine * shear_y, sine * shear_x + cosine, 2 * strengths["shift_y"]], dim=1),
    )
    return torch.stack(rows, dim=1)


def mirrored(maps: Tensor, flip: Tensor) -> Tensor:
    """The maps, after left and right were exchanged where ``flip [n]`` (bool)."""
    left_to_right = maps[:, :, :1] * torch.where(flip, -1.0, 1.0).view(-1, 1, 1)
    return torch.cat([left_to_right, maps[:, :, 1:]], dim=2)


def warp(images: Tensor, maps: Tensor, size: tuple[int, int], *, fill: float | None) -> Tensor:
    """``images`` resampled through ``maps``, bilinear. ``[n, channels, *size]`` float32.

    Outside of an image is ``fill``; None: its outermost pixels.
    """
    count, channels = images.shape[:2]
    source = to_unit(images)
    if count == 0:
        return source.new_empty(0, channels, *size)
    grid = source.new_empty(count, *size, 2)
    down, across = (_places(side, images.device) for side in size)
    for axis in (0, 1):
        along_columns = (maps[:, axis, :1] * across).unsqueeze(1)  # [n, 1, width]
        along_rows = (maps[:, axis, 1:2] * down + maps[:, axis, 2:]).unsqueeze(2)  # [n, height, 1]
        torch.add(along_columns, along_rows, out=grid[..., axis])
    if fill:  # grid_sample knows 0 outside
        source = source - fill if source is images else source.sub_(fill)
    padding = "border" if fill is None else "zeros"
    found = functional.grid_sample(source, grid, mode="bilinear", padding_mode=padding, align_corners=False)
    return found.add_(fill) if fill else found


def _places(side: int, device: torch.device) -> Tensor:
    """Centres of ``side`` pixels in [-1, 1]."""
    return (2 * torch.arange(side, device=device) + 1) / side - 1
