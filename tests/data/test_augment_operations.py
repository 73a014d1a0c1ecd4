"""The operations against Pillow, one by one, to the bit; the rest of what they promise."""

import pytest
import torch
from pillow_operations import PILLOW, by_pillow

from fastmeta.data.augment import CODES, OPERATIONS, apply_operations

# Where a bound is far beyond what anybody uses.
USED = {"color": (0, 3), "contrast": (0, 3), "brightness": (0, 3), "sharpness": (0, 3), "rotate": (-180, 180)}
USED |= {"translate-x": (-20, 20), "translate-y": (-20, 20)}


def drawn_images(generator, *shape):
    """Random ones, of few values, of one value, and a ramp."""
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    images[1::4] = images[1::4] // 5 + 90
    images[2::4] = images[2::4, :, :1, :1]
    images[3::4] = (torch.arange(shape[3]) * 3 % 256).to(torch.uint8)
    return images


def drawn_levels(generator, name, count):
    low, high = USED.get(name, OPERATIONS[name][:2])
    levels = low + (high - low) * torch.rand(count, generator=generator)
    levels[:3] = torch.tensor([low, high, round(float(levels[2]))])
    if name == "rotate":
        levels[3:9] = torch.tensor([90.0, 270, 45, -45, 30, -60])
    return levels


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (5, 9), (32, 32), (31, 54)], ids=str)
@pytest.mark.parametrize("name", PILLOW)
def test_an_operation_is_pillow_s(name, shape, generator):
    for channels in (1, 3):
        images = drawn_images(generator, 12, channels, *shape)
        levels = drawn_levels(generator, name, 12)
        result = apply_operations(images, torch.full((12, 1), CODES[name]), levels.unsqueeze(1))
        expected = torch.stack([by_pillow(*row) for row in zip(images, [name] * 12, levels.tolist(), strict=True)])
        assert result.equal(expected)
