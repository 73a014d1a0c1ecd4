"""What users have: Pillow, image by image, as the ports of FixMatch to PyTorch do it."""

import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from bench.pillow_operations import randaugment, to_pixels
from fastmeta.data import Images

SIDE = 256


class PillowPairs(Dataset[tuple[Tensor, Tensor]]):
    """A weak view, flipped and shifted, and a strong one, with RandAugment too. uint8."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        pixels = self.images.get(torch.tensor([place]))[0].numpy().transpose(1, 2, 0)
        weak, strong = _moved(pixels), _moved(pixels)
        return to_pixels(weak), to_pixels(randaugment(strong))


def _moved(pixels: np.ndarray) -> Image.Image:
    margin = len(pixels) // 8
    image = Image.fromarray(np.pad(pixels, ((margin, margin), (margin, margin), (0, 0)), mode="reflect"))
    if random.random() < 0.5:
        image = ImageOps.mirror(image)
    left, top = (random.randint(0, 2 * margin) for _ in range(2))
    return image.crop((left, top, left + len(pixels), top + len(pixels)))


def decoded(path: Path) -> np.ndarray:
    """A picture with its shorter side resized to 256 pixels, and of it the middle square."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    scale = SIDE / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
    left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
    return np.asarray(image.crop((left, top, left + SIDE, top + SIDE)))
