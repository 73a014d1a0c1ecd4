"""Strong augmentation of drawings and writing: no flip by itself, which would make another character."""

from dataclasses import dataclass

from torch import Tensor

from fastmeta.data.augment.affine import affine_map, mirrored, warp
from fastmeta.data.augment.pixels import centre, cut_, mean_of, noise
from fastmeta.data.augment.strengths import draw_operations
from fastmeta.data.random_numbers import KeyedRandom

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


@dataclass(frozen=True)
class StrongAugment:
    """RandAugment-style strong augmentation followed by a cutout; every image draws its own operations.

    Args:
        size: side of the result; images of another size are brought to it first.
        operations_per_image: how many different operations each image draws from :data:`OPERATIONS`.
        strength: multiplies every limit in :data:`OPERATIONS`.
        cutout: side of the square set to 0, as a fraction of the image's side; 0 for none.
        flip: exchange left and right of every second image first.

    >>> import torch
    >>> images = torch.rand(4, 1, 8, 8)
    >>> StrongAugment(8)(images, KeyedRandom(0, "unlabeled", "strong", torch.arange(4))).shape
    torch.Size([4, 1, 8, 8])
    """

    size: int
    operations_per_image: int = 3
    strength: float = 1.0
    cutout: float = 0.25
    flip: bool = False

    def __call__(self, images: Tensor, random: KeyedRandom) -> Tensor:
        """Of ``[n, channels, height, width]`` in [0, 1] or uint8: ``[n, channels, size, size]`` float32 in [0, 1]."""
        images = centre(images, self.size)
        more = 4 if self.flip else 3
        uniform = random.uniform(2 * len(OPERATIONS) + more).to(images.device)
        of_operations, drawn = uniform.split([2 * len(OPERATIONS), more], dim=1)
        strengths = draw_operations(
            of_operations, OPERATIONS, per_image=self.operations_per_image, strength=self.strength
        )
        maps = affine_map(strengths)
        if self.flip:
            maps = mirrored(maps, drawn[:, 3] < 0.5)
        moved = warp(images, maps, (self.size, self.size), fill=0.0)
        shaded = _shade(moved, {name: strength.view(-1, 1, 1, 1) for name, strength in strengths.items()}, drawn[:, 2])
        return cut_(shaded, drawn[:, :2], self.cutout, 0.0)


def _shade(images: Tensor, strengths: dict[str, Tensor], offset: Tensor) -> Tensor:
    """Contrast about the image's mean, gamma, brightness and Gaussian noise, clamped to [0, 1]."""
    mean = mean_of(images)
    shaded = (images - mean) * strengths["contrast"].double().exp().float() + mean + strengths["brightness"]
    # the tiny floor keeps 0 ** gamma from needing a special case
    shaded = shaded.clamp_(1e-6, 1).double().pow_(strengths["gamma"].double().exp()).float()
    return shaded.add_(noise(images.shape, offset).mul_(strengths["noise"])).clamp_(0, 1)
