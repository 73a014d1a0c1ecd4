"""The operations as Pillow does them, and RandAugment of them image by image, as the ports of FixMatch have it."""

import math
import random
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

from fastmeta.data.augment import RANDAUGMENT

Change = Callable[[Image.Image], Image.Image]
Operation = Callable[[Image.Image, float], Image.Image]  # of a level


def _blended(change: Change) -> Operation:
    return lambda image, share: Image.blend(image, change(image), share)


def _enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    return lambda image, factor: kind(image).enhance(factor)


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


def _rescaled(method: Image.Resampling) -> Operation:
    def rescale(image: Image.Image, cut: float) -> Image.Image:
        width, height = image.size
        box = (cut * width, cut * height, width * (1 - cut), height * (1 - cut))
        return image.crop(box).resize(image.size, method)

    return rescale


_METHODS = ("LANCZOS", "BICUBIC", "BILINEAR", "BOX", "HAMMING", "NEAREST")
PILLOW: dict[str, Operation] = {
    "identity": lambda image, _: image,
    "autocontrast": _blended(ImageOps.autocontrast),
    "equalize": _blended(ImageOps.equalize),
    "rotate": lambda image, degrees: image.rotate(degrees),
    "solarize": lambda image, threshold: ImageOps.solarize(image, math.ceil(threshold)),
    "color": _enhanced(ImageEnhance.Color),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "shear-x": lambda image, slope: _affine(image, 1, slope, 0, 0, 1, 0),
    "shear-y": lambda image, slope: _affine(image, 1, 0, 0, slope, 1, 0),
    "translate-x": lambda image, pixels: _affine(image, 1, 0, pixels, 0, 1, 0),
    "translate-y": lambda image, pixels: _affine(image, 1, 0, 0, 0, 1, pixels),
    "posterize": lambda image, bits: ImageOps.posterize(image, int(bits)),
    "invert": _blended(ImageOps.invert),
    "blur": _blended(lambda image: image.filter(ImageFilter.BLUR)),
    "smooth": _blended(lambda image: image.filter(ImageFilter.SMOOTH)),
    **{f"rescale-{name.lower()}": _rescaled(Image.Resampling[name]) for name in _METHODS},
}


def to_image(pixels: Tensor) -> Image.Image:
    """Of uint8 ``[1 or 3, H, W]``."""
    array = pixels.permute(1, 2, 0).numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def to_pixels(image: Image.Image) -> Tensor:
    """uint8 ``[1 or 3, H, W]``."""
    array = np.array(image)
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)


def by_pillow(pixels: Tensor, name: str, level: float) -> Tensor:
    """``pixels [C, H, W]`` after one operation."""
    return to_pixels(PILLOW[name](to_image(pixels), level))


def randaugment(image: Image.Image) -> Image.Image:
    """Two operations, each applied with probability 0.5, and a square of half the side, as Google's code draws them."""
    preset, side = RANDAUGMENT["google"], image.width
    for name in random.choices(list(preset.strengths), k=preset.per_image):
        strength, magnitude = preset.strengths[name], random.randint(1, 9)
        moved = magnitude * strength.span / 10 * (side if strength.of_side else 1)
        moved = math.trunc(moved) if strength.whole else moved
        if random.random() < preset.probability:
            image = PILLOW[name](image, strength.first + moved * (random.choice((1, -1)) if strength.signed else 1))
    left, top = (random.randrange(side) - side // 4 for _ in range(2))
    image.paste((127, 127, 127), (left, top, left + side // 2, top + side // 2))
    return image
