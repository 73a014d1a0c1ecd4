"""What users have: Pillow, image by image, as the ports of FixMatch to PyTorch do it."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from fastmeta.data import Images

SIDE = 256


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


def _uniform(limit: float) -> float:
    return random.uniform(-limit, limit)


OPERATIONS: list[Callable[[Image.Image], Image.Image]] = [
    lambda image: image,
    lambda image: _affine(image, 1, 0, _uniform(0.3) * image.width, 0, 1, 0),
    lambda image: _affine(image, 1, 0, 0, 0, 1, _uniform(0.3) * image.height),
    lambda image: image.rotate(_uniform(30)),
    lambda image: _affine(image, 1, _uniform(0.3), 0, 0, 1, 0),
    lambda image: _affine(image, 1, 0, 0, _uniform(0.3), 1, 0),
    lambda image: ImageEnhance.Brightness(image).enhance(1 + _uniform(0.9)),
    lambda image: ImageEnhance.Contrast(image).enhance(1 + _uniform(0.9)),
    lambda image: ImageEnhance.Color(image).enhance(1 + _uniform(0.9)),
    lambda image: ImageOps.solarize(image, random.randint(0, 255)),
]


class PillowPairs(Dataset[tuple[Tensor, Tensor]]):
    """A weak view, flipped and shifted, and a strong one, with two operations and a cutout. uint8."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        pixels = self.images.get(torch.tensor([place]))[0].numpy().transpose(1, 2, 0)
        weak, strong = _moved(pixels), _moved(pixels)
        for operation in random.choices(OPERATIONS, k=2):
            strong = operation(strong)
        side = strong.width // 2
        left, top = (random.randint(0, strong.width - side) for _ in range(2))
        strong.paste((127, 127, 127), (left, top, left + side, top + side))
        return _tensor(weak), _tensor(strong)


def _moved(pixels: np.ndarray) -> Image.Image:
    margin = len(pixels) // 8
    image = Image.fromarray(np.pad(pixels, ((margin, margin), (margin, margin), (0, 0)), mode="reflect"))
    if random.random() < 0.5:
        image = ImageOps.mirror(image)
    left, top = (random.randint(0, 2 * margin) for _ in range(2))
    return image.crop((left, top, left + len(pixels), top + len(pixels)))


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def decoded(path: Path) -> np.ndarray:
    """A picture with its shorter side resized to 256 pixels, and of it the middle square."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    scale = SIDE / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
    left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
    return np.asarray(image.crop((left, top, left + SIDE, top + SIDE)))
