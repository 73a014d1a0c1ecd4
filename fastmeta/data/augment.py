"""Weak and strong image augmentation: batched, every image with its own random operations, on any device.

An image draws a few operations and a strength for each. Geometric operations of one image compose into one affine map
and all intensity operations into one pass, so that the cost does not grow with their number. Random numbers come from
the generator that is passed in (on the CPU: the device is never waited for).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

# Strongest value of each operation (drawn uniformly from [-limit, limit]); 0 is the identity for all of them.
# Shifts are fractions of the image's side, rotation radians, shear a slope, the next three natural logarithms of a
# factor, brightness and noise fractions of full intensity.
OPERATIONS: dict[str, float] = {
    "identity": 0.0,
    "shift_x": 0.2,
    "shift_y": 0.2,
    "rotate": 0.45,
    "shear_x": 0.35,
    "shear_y": 0.35,
    "stretch": 0.25,
    "contrast": 0.6,
    "gamma": 0.6,
    "brightness": 0.25,
    "noise": 0.2,
}
_COLUMN = {name: column for column, name in enumerate(OPERATIONS)}


def weak_augment(images: Tensor, generator: torch.Generator, *, max_shift: int = 1) -> Tensor:
    """Shift every image by a whole number of pixels, up to ``max_shift`` either way; what moves in is 0.

    Args:
        images: ``[N, channels, height, width]``.
        generator: source of randomness, on the CPU.
        max_shift: pixels.

    Returns:
        ``[N, channels, height, width]``.

    >>> weak_augment(torch.ones(3, 1, 8, 8), torch.Generator().manual_seed(0)).shape
    torch.Size([3, 1, 8, 8])
    """
    count, channels, height, width = images.shape
    if count == 0:
        return images.clone()
    shift = torch.randint(0, 2 * max_shift + 1, (2, count, 1), generator=generator).to(images.device)
    rows = shift[0] + torch.arange(height, device=images.device)  # [N, height], places in the padded image
    columns = shift[1] + torch.arange(width, device=images.device)  # [N, width]
    padded = functional.pad(images, (max_shift,) * 4)
    flat = (rows.unsqueeze(2) * (width + 2 * max_shift) + columns.unsqueeze(1)).view(count, 1, -1)
    moved = padded.flatten(2).gather(2, flat.expand(-1, channels, -1))
    return moved.view(count, channels, height, width)


@dataclass(frozen=True)
class StrongAugment:
    """RandAugment-style strong augmentation followed by a cutout.

    Args:
        operations_per_image: how many different operations each image draws from :data:`OPERATIONS`.
        strength: multiplies every limit in :data:`OPERATIONS`.
        cutout: side of the square set to 0, as a fraction of the image's side; 0 for none.

    >>> images = torch.rand(4, 1, 8, 8)
    >>> StrongAugment()(images, torch.Generator().manual_seed(0)).shape
    torch.Size([4, 1, 8, 8])
    """

    operations_per_image: int = 3
    strength: float = 1.0
    cutout: float = 0.25

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augmented copies of ``images`` ``[N, channels, height, width]`` in [0, 1], same shape and range."""
        count = images.shape[0]
        if count == 0:
            return images.clone()
        drawn = torch.rand(count, len(OPERATIONS), generator=generator).topk(self.operations_per_image).indices
        limits = torch.tensor(list(OPERATIONS.values())) * self.strength
        values = (2 * torch.rand(count, len(OPERATIONS), generator=generator) - 1) * limits
        chosen = torch.zeros_like(values).scatter_(1, drawn, 1.0)
        strengths = (values * chosen).to(images.device, images.dtype)  # [N, operations], 0 where not drawn
        corner = torch.rand(2, count, generator=generator).to(images.device)
        noise = torch.randn(images.shape, generator=generator).to(images.device, images.dtype)

        moved = _warp(images, strengths)
        shaded = _shade(moved, strengths, noise)
        return _cut(shaded, corner, self.cutout)


def _of(strengths: Tensor, name: str) -> Tensor:
    return strengths[:, _COLUMN[name]]


def _warp(images: Tensor, strengths: Tensor) -> Tensor:
    """One affine resampling for all geometric operations (bilinear, 0 outside)."""
    angle = _of(strengths, "rotate")
    scale = _of(strengths, "stretch").exp()
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    shear_x, shear_y = _of(strengths, "shear_x"), _of(strengths, "shear_y")
    # rotation and scale after both shears: [[c, -s], [s, c]] @ [[1, shear_x], [shear_y, 1]]
    rows = (
        torch.stack([cosine - sine * shear_y, cosine * shear_x - sine, 2 * _of(strengths, "shift_x")], dim=1),
        torch.stack([sine + cosine * shear_y, sine * shear_x + cosine, 2 * _of(strengths, "shift_y")], dim=1),
    )
    grid = functional.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _shade(images: Tensor, strengths: Tensor, noise: Tensor) -> Tensor:
    """Contrast about the image's mean, gamma, brightness and Gaussian noise, clamped to [0, 1]."""

    def column(name: str) -> Tensor:
        return _of(strengths, name).view(-1, 1, 1, 1)

    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    shaded = (images - mean) * column("contrast").exp() + mean + column("brightness")
    # the tiny floor keeps 0 ** gamma from needing a special case
    shaded = shaded.clamp(1e-6, 1).pow(column("gamma").exp())
    return (shaded + column("noise").abs() * noise).clamp(0, 1)


def _cut(images: Tensor, corner: Tensor, fraction: float) -> Tensor:
    """Set one square per image to 0; it always lies inside the image. ``corner`` is ``[2, N]`` in [0, 1)."""
    _, _, height, width = images.shape
    tall, wide = round(fraction * height), round(fraction * width)
    if tall == 0 or wide == 0:
        return images
    top = (corner[0] * (height - tall + 1)).long().view(-1, 1)
    left = (corner[1] * (width - wide + 1)).long().view(-1, 1)
    row = torch.arange(height, device=images.device)
    column = torch.arange(width, device=images.device)
    in_rows = (row >= top) & (row < top + tall)  # [N, height]
    in_columns = (column >= left) & (column < left + wide)  # [N, width]
    return images.masked_fill((in_rows.unsqueeze(2) & in_columns.unsqueeze(1)).unsqueeze(1), 0.0)
