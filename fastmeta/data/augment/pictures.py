"""Strong augmentation of photographs and the like."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastmeta.data.augment.affine import affine_map, mirrored, warp
from fastmeta.data.augment.pixels import centre, cut_, gray, mean_of, to_canvas
from fastmeta.data.augment.strengths import draw_operations
from fastmeta.data.augment.weak import RandomCrop
from fastmeta.data.random_numbers import KeyedRandom

GRAY = 0.5  # of what moves in and of the cutout

# Strongest value of each operation (drawn uniformly from [-limit, limit]); 0 is the identity for all of them. The
# ranges are those of FixMatch's RandAugment. Shifts are fractions of the side, rotation radians (30 degrees), shears
# slopes; brightness, contrast and color add to a factor of 1; solarize inverts what is brighter than 1 - |strength|.
OPERATIONS: dict[str, float] = {
    "identity": 0.0,
    "shift_x": 0.3,
    "shift_y": 0.3,
    "rotate": 0.5236,
    "shear_x": 0.3,
    "shear_y": 0.3,
    "brightness": 0.9,
    "contrast": 0.9,
    "color": 0.9,
    "solarize": 1.0,
}


@dataclass(frozen=True)
class StrongPicture:
    """Flip, a few RandAugment-style operations and a cutout; every image draws its own.

    An image's geometric operations, its flip and its crop are one resampling, brightness, contrast and color one linear
    map of its pixels, so that the cost does not grow with their number.

    Args:
        size: side of the result; without ``crop``, images of another size are brought to it first.
        operations_per_image: how many different operations each image draws from :data:`OPERATIONS`.
        strength: multiplies every limit in :data:`OPERATIONS`.
        cutout: side of the gray square, as a fraction of the image's side; 0 for none.
        crop: cut a random rectangle first.
        flip: exchange left and right of every second image.

    >>> images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    >>> StrongPicture(32)(images, KeyedRandom(0, "unlabeled", "strong", torch.arange(4))).shape
    torch.Size([4, 3, 32, 32])
    """

    size: int
    operations_per_image: int = 2
    strength: float = 1.0
    cutout: float = 0.5
    crop: RandomCrop | None = None
    flip: bool = True

    def __call__(self, images: Tensor, random: KeyedRandom) -> Tensor:
        """Of ``[n, channels, height, width]`` in [0, 1] or uint8: ``[n, channels, size, size]`` float32 in [0, 1]."""
        images = centre(images, self.size) if self.crop is None else to_canvas(images, self.size)
        uniform = random.uniform(2 * len(OPERATIONS) + 3).to(images.device)
        of_operations, drawn = uniform.split([2 * len(OPERATIONS), 3], dim=1)
        strengths = draw_operations(
            of_operations, OPERATIONS, per_image=self.operations_per_image, strength=self.strength
        )
        maps = affine_map(strengths)
        if self.flip:
            maps = mirrored(maps, drawn[:, 2] < 0.5)
        if self.crop is not None:
            maps = _after(self.crop.maps(images, random), maps)
        moved = warp(images, maps, (self.size, self.size), fill=GRAY)
        shaded = _shade_(moved, {name: strength.view(-1, 1, 1, 1) for name, strength in strengths.items()})
        return cut_(shaded, drawn[:, :2], self.cutout, GRAY)


def _after(crop: Tensor, maps: Tensor) -> Tensor:
    """``crop``, whose x depends on x alone and y on y, after ``maps``."""
    scale = crop[:, :, :2].diagonal(dim1=1, dim2=2).unsqueeze(2)
    return torch.cat([maps[:, :, :2] * scale, maps[:, :, 2:] * scale + crop[:, :, 2:]], dim=2)


def _shade_(images: Tensor, strengths: dict[str, Tensor]) -> Tensor:
    """Brightness, color and contrast, clamped to [0, 1], then solarize; in place.

    ``b x`` is the brighter image, ``g + c (b x - g)`` with the gray image g of that the more colorful one, and
    ``m + k (. - m)`` with its mean m the one of more contrast: together
    ``k c b x + k (1 - c) b gray(x) + (1 - k) b m(x)``.
    """
    brightness, color, contrast = (1 + strengths[name] for name in ("brightness", "color", "contrast"))
    luma = gray(images)
    rest = luma * (contrast * (1 - color) * brightness) + (1 - contrast) * brightness * mean_of(luma)
    images.mul_(contrast * color * brightness).add_(rest).clamp_(0, 1)
    bright = images.clone().gt_(1 - strengths["solarize"].abs())  # 0 or 1
    return images.sub_(bright).abs_()
