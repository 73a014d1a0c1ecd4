"""ZCA as Oliver et al. (2018) have it, in NumPy, and the views that begin with it."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fastmeta.data import AugmentationConfig, KeyedRandom, Shift, views_for
from fastmeta.data.augment import Noisy, Plain, Whitened, Whitening
from fastmeta.data.augment.whitening import contrast_normalized, second_moments

SIDE = 6


def pictures(count: int, channels: int = 3) -> Tensor:
    """Neighbours resemble each other, so that there is something to whiten."""
    generator = torch.Generator().manual_seed(0)
    rough = torch.rand(count, channels, SIDE + 2, SIDE + 2, generator=generator)
    smooth = torch.nn.functional.avg_pool2d(rough, 3, stride=1)
    return (smooth * 255).round().to(torch.uint8)


def moments_of(images: Tensor) -> Tensor:
    return second_moments(contrast_normalized(images, SIDE))


def published(train: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Rows of pixels from 0 to 255; written from the formulas of their contrast normalization and ZCA."""

    def contrast(rows: np.ndarray) -> np.ndarray:
        rows = rows.astype(float)
        rows = rows - rows.mean(axis=1, keepdims=True)
        length = np.sqrt((rows**2).sum(axis=1, keepdims=True))
        length[length < 1e-10] = 1
        return 55 * rows / length

    train, images = contrast(train), contrast(images)
    left, values, _ = np.linalg.svd(np.cov(train, rowvar=False) + 0.1 * np.eye(train.shape[1]))
    return (images - train.mean(axis=0)) @ (left @ np.diag(values**-0.5) @ left.T)


def test_it_is_the_published_one() -> None:
    train, images = pictures(300), pictures(330)[290:]
    images[0] = 77  # of one color
    moments = moments_of(train[:100]) + moments_of(train[100:])
    white = Whitening.of(moments, (3, SIDE, SIDE))(images)
    expected = published(train.flatten(1).numpy(), images.flatten(1).numpy())
    assert white.dtype == torch.float32
    np.testing.assert_allclose(white.flatten(1).numpy(), expected, atol=2e-4)
    assert abs(float(white.std()) - 1) < 0.15
    assert Whitening.of(moments, (3, SIDE, SIDE))(images[:0]).shape == (0, 3, SIDE, SIDE)
    again = Whitening.of(moments, (3, SIDE, SIDE))(images.float() / 255)
    torch.testing.assert_close(again, white, atol=1e-4, rtol=0)


def test_few_images_are_whitened_alike() -> None:
    train, images = pictures(60), pictures(90)[60:]  # of 108 numbers each
    few = Whitening.of_few(contrast_normalized(train, SIDE), (3, SIDE, SIDE))
    expected = published(train.flatten(1).numpy(), images.flatten(1).numpy())
    np.testing.assert_allclose(few(images).flatten(1).numpy(), expected, atol=5e-4)
    torch.testing.assert_close(Whitening.of(moments_of(train), (3, SIDE, SIDE)).matrix, few.matrix, atol=1e-5, rtol=0)


def test_larger_images_are_whitened_in_their_middle() -> None:
    large = pictures(200).repeat(1, 1, 2, 2)
    assert contrast_normalized(large, SIDE).equal(contrast_normalized(Plain(SIDE)(large), SIDE))


def test_views_begin_with_it() -> None:
    images = pictures(200)
    whitening = Whitening.of(moments_of(images), (3, SIDE, SIDE))
    settings = AugmentationConfig(shift=2, noise=0.15, whitening="zca")
    views = views_for("pictures", (3, SIDE, SIDE), SIDE, settings, whitening)
    weak = Noisy(Whitened(whitening, Shift(SIDE, 2, "reflected", flip=True)), 0.15)
    assert (views.weak, views.strong) == (weak, weak)
    assert views.plain(images).equal(whitening(images))
    random = [KeyedRandom(0, "labeled", "weak", torch.arange(200)) for _ in range(2)]
    moved = Shift(SIDE, 2, "reflected", flip=True)(whitening(images), random[0])
    noise = views.weak(images, random[1]) - moved
    assert abs(float(noise.std()) - 0.15) < 0.005
    assert "Whitening((3, 6, 6), " in repr(views)
    other = Whitening.of(moments_of(images[:150]), (3, SIDE, SIDE))
    assert repr(other) != repr(whitening) == repr(Whitening(whitening.mean, whitening.matrix, (3, SIDE, SIDE)))


def test_one_image_is_not_enough() -> None:
    with pytest.raises(ValueError, match=r"images must be at least 2 for augmentation.whitening zca, got 1"):
        Whitening.of(moments_of(pictures(1)), (3, SIDE, SIDE))
