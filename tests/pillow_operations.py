"""The operations as Pillow does them: the oracle."""

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps


def _blended(change):
    return lambda image, share: Image.blend(image, change(image), share)


def _affine(image, *matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


def _rescaled(method):
    def rescale(image, cut):
        width, height = image.size
        box = (cut * width, cut * height, width * (1 - cut), height * (1 - cut))
        return image.crop(box).resize(image.size, method)

    return rescale


_FILTERS = {f"rescale-{each.name.lower()}": _rescaled(each) for each in list(Image.Resampling)[:6]}
PILLOW = {
    "identity": lambda image, _: image,
    "autocontrast": _blended(ImageOps.autocontrast),
    "equalize": _blended(ImageOps.equalize),
    "rotate": lambda image, degrees: image.rotate(degrees),
    "solarize": ImageOps.solarize,
    "color": lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    "contrast": lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    "brightness": lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    "sharpness": lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor),
    "shear-x": lambda image, slope: _affine(image, 1, slope, 0, 0, 1, 0),
    "shear-y": lambda image, slope: _affine(image, 1, 0, 0, slope, 1, 0),
    "translate-x": lambda image, pixels: _affine(image, 1, 0, pixels, 0, 1, 0),
    "translate-y": lambda image, pixels: _affine(image, 1, 0, 0, 0, 1, pixels),
    "posterize": lambda image, bits: ImageOps.posterize(image, int(bits)),
    "invert": _blended(ImageOps.invert),
    "blur": _blended(lambda image: image.filter(ImageFilter.BLUR)),
    "smooth": _blended(lambda image: image.filter(ImageFilter.SMOOTH)),
    **_FILTERS,
}


def by_pillow(image, name, level):
    """``image`` uint8 ``[C, H, W]`` after one operation."""
    pixels = image.permute(1, 2, 0).numpy()
    result = PILLOW[name](Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels), level)
    return torch.from_numpy(np.array(result).reshape(pixels.shape)).permute(2, 0, 1)
