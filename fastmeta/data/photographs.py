"""Patches of the photographs that ship with scikit-image and scikit-learn: real images in colour, no network."""

from collections.abc import Callable

import numpy as np
import torch

from fastmeta.data.images import ImageDataset
from fastmeta.data.readers.optional import optional

SIDE = 32  # pixels of a patch
_BLOCK = 96  # pixels: patches overlap within a block and never reach into another
_STRIDE = 16
_LARGEST = 480  # of a photograph its centre, so that no class is much larger than another


def load_photographs() -> ImageDataset:
    """Patches of ten photographs, ``[5550, 3, 32, 32]`` uint8; the class is the photograph that a patch is from.

    The centre of a photograph, at most 480 pixels, is cut into blocks of 96. Every third block along rows and columns
    is the official test part (1,750 patches), the others are "train" (3,800); a block gives 25 patches, 16 pixels
    apart, so no pixel is in both parts.

    Raises:
        MissingPackage: scikit-image or scikit-learn is not installed.
    """
    patches, targets, names, tested = [], [], [], []
    openers = _photographs()
    for number, (name, opened) in enumerate(openers.items()):
        pixels = opened()
        top, left = (max(0, side - _LARGEST) // 2 for side in pixels.shape[:2])
        rows, columns = (min(side, _LARGEST) // _BLOCK for side in pixels.shape[:2])
        for row in range(rows):
            for column in range(columns):
                for y in range(0, _BLOCK - SIDE + 1, _STRIDE):
                    for x in range(0, _BLOCK - SIDE + 1, _STRIDE):
                        y0, x0 = top + row * _BLOCK + y, left + column * _BLOCK + x
                        patches.append(pixels[y0 : y0 + SIDE, x0 : x0 + SIDE])
                        targets.append(number)
                        names.append(f"{name}[{y0}, {x0}]")
                        tested.append((row + column) % 3 == 2)
    images = torch.from_numpy(np.stack(patches).transpose(0, 3, 1, 2).copy())
    is_test = torch.tensor(tested)
    parts = {"train": torch.where(~is_test)[0], "test": torch.where(is_test)[0]}
    return ImageDataset("photographs", images, torch.tensor(targets), tuple(openers), parts, names)


def _photographs() -> dict[str, Callable[[], np.ndarray]]:
    """``[height, width, 3]`` uint8 each; those that are one colour throughout are left out, and textures are gray."""
    skimage = optional("skimage.data", "scikit-image", "photographs")
    sklearn = optional("sklearn.datasets", "scikit-learn", "photographs")
    return {
        "astronaut": skimage.astronaut,
        "brick": lambda: _in_colour(skimage.brick()),
        "chelsea": skimage.chelsea,
        "china": lambda: sklearn.load_sample_image("china.jpg"),
        "coffee": skimage.coffee,
        "flower": lambda: sklearn.load_sample_image("flower.jpg"),
        "grass": lambda: _in_colour(skimage.grass()),
        "gravel": lambda: _in_colour(skimage.gravel()),
        "motorcycle": lambda: skimage.stereo_motorcycle()[0],
        "tissue": skimage.immunohistochemistry,
    }


def _in_colour(gray: np.ndarray) -> np.ndarray:
    return np.repeat(gray[:, :, None], 3, axis=2)
