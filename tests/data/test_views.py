"""Which views a name and its settings give."""

import math

import pytest
import torch

from fastmeta.data import (
    AugmentationConfig,
    KeyedRandom,
    Plain,
    RandomCrop,
    Shift,
    StrongAugment,
    StrongPicture,
    views_for,
)
from fastmeta.data.augment import Noisy, RandAugment


def random(count=64, view="weak", start=0):
    return KeyedRandom(0, "unlabeled", view, torch.arange(start, start + count))


def test_views_by_name():
    digits = views_for("auto", (1, 8, 8), 8)
    assert digits == views_for("digits", (1, 8, 8), 8)
    assert (digits.weak, digits.strong) == (Shift(8, 1), StrongAugment(8))
    small = views_for("auto", (3, 32, 32), 32)
    assert (small.weak, small.strong) == (Shift(32, 4, "reflected", flip=True), StrongPicture(32))
    assert views_for("auto", (1, 64, 64), 64) == views_for("pictures", (1, 64, 64), 64)
    large = views_for("auto", (3, 256, 256), 224)
    assert (large.weak, large.strong) == (RandomCrop(224), StrongPicture(224, crop=RandomCrop(224)))
    none = views_for("none", (3, 32, 32), 32)
    assert none.weak == none.strong == none.plain == Plain(32)
    with pytest.raises(ValueError, match="views must be one of auto, digits, pictures, none, got 'photos'"):
        views_for("photos", (3, 32, 32), 32)
    with pytest.raises(ValueError, match="image_size must be at least 2, got 1"):
        views_for("auto", (3, 32, 32), 1)


def weak(name, size, **settings):
    return views_for(name, (3, size, size), size, AugmentationConfig(**settings)).weak


def test_views_of_the_papers():
    assert weak("pictures", 32) == Shift(32, 4, "reflected", flip=True)  # MixMatch, FixMatch, Learning to Impute
    assert weak("pictures", 32, padding="zeros") == Shift(32, 4, "zeros", flip=True)  # Meta-Gradient
    assert weak("pictures", 32, shift=2) == Shift(32, 2, "reflected", flip=True)  # Oliver et al.
    assert weak("pictures", 32, flip=False) == Shift(32, 4, "reflected")  # house numbers
    assert weak("digits", 8, shift=2) == Shift(8, 2)
    assert weak("none", 8, flip=True) == Shift(8, 0, flip=True)
    assert weak("pictures", 8, flip=False, shift=0) == Plain(8)
    assert weak("pictures", 224, flip=False) == RandomCrop(224, flip=False)
    assert weak("pictures", 224, shift=16) == Shift(224, 16, "reflected", flip=True)


def test_a_flip_that_is_asked_for_is_in_both_views():
    views = views_for("digits", (1, 28, 28), 28, AugmentationConfig(flip=True))
    assert views.strong == StrongAugment(28, flip=True)
    half = torch.zeros(2000, 1, 28, 28)
    half[..., :14] = 1.0
    calm = StrongAugment(28, strength=0.0, cutout=0.0, flip=True)(half, random(2000))
    flipped = calm[:, 0, 14, 0] < 0.5
    assert 900 < int(flipped.sum()) < 1100
    torch.testing.assert_close(calm, torch.where(flipped.view(-1, 1, 1, 1), half.flip(3), half), rtol=0, atol=2e-6)


def test_settings_of_ctaugment_are_refused_without_it():
    for name, value in (("cutout", False), ("threshold", 0.5), ("adapt", False)):
        message = f"augmentation.{name} must be .* unless augmentation.strong is ctaugment, got {value}"
        with pytest.raises(ValueError, match=message):
            views_for("pictures", (3, 32, 32), 32, AugmentationConfig(**{name: value}))
        views_for("pictures", (3, 32, 32), 32, AugmentationConfig(strong="ctaugment", **{name: value}))


def test_a_strong_view_follows_what_the_weak_one_is():
    def strong_of(size, **settings):
        return views_for("pictures", (3, size, size), size, AugmentationConfig(**settings)).strong

    assert strong_of(32, strong="weak", shift=1) == weak("pictures", 32, shift=1)
    assert strong_of(32, flip=False) == StrongPicture(32, flip=False)
    assert strong_of(32, strong="randaugment-paper", shift=2) == RandAugment(32, "paper", weak("pictures", 32, shift=2))
    policy = views_for("pictures", (3, 32, 32), 32, AugmentationConfig(strong="ctaugment", threshold=0.8, cutout=False))
    assert policy.strong is policy.policy
    assert (policy.policy.weak, policy.policy.threshold, policy.policy.cutout) == (policy.weak, 0.8, False)
    fixed = views_for("pictures", (3, 32, 32), 32, AugmentationConfig(strong="ctaugment", adapt=False))
    assert (fixed.policy, fixed.strong.adapt) == (None, False)
    assert strong_of(224, flip=False) == StrongPicture(224, crop=RandomCrop(224, flip=False), flip=False)


@pytest.mark.parametrize(
    "augmentation", [RandomCrop(16, flip=False), StrongPicture(16, strength=0.0, cutout=0.0, flip=False)]
)
def test_nothing_is_mirrored_without_flip(augmentation):
    ramp = torch.linspace(0, 1, 16).expand(200, 1, 16, 16)
    result = augmentation(ramp, random(200))
    assert bool((result[..., -1] > result[..., 0]).all())


def test_noise_is_added_to_both_views_and_never_where_nothing_is_drawn():
    views = views_for("pictures", (3, 8, 8), 8, AugmentationConfig(noise=0.15, strong="weak"))
    images = torch.full((400, 3, 8, 8), 102, dtype=torch.uint8)
    assert views.plain(images).equal(Plain(8)(images))
    drawn = [view(images, random(400, view=name)) - 0.4 for name, view in (("a", views.weak), ("b", views.strong))]
    for noise_of in drawn:
        assert float(noise_of.mean()) == pytest.approx(0, abs=0.002)
        assert float(noise_of.std()) == pytest.approx(0.15, rel=0.01)
    assert abs(float((drawn[0] * drawn[1]).mean())) < 0.001
    unmoved = Noisy(Plain(8), 0.15)
    source = torch.rand(3, 3, 8, 8)
    before = source.clone()
    assert unmoved(source[1:], random(2, start=1)).equal(unmoved(source, random(3))[1:])
    assert source.equal(before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strong": "rand"}, "augmentation.strong must be one of auto, randaugment-google, .*, got 'rand'"),
        ({"padding": "wrap"}, "augmentation.padding must be one of zeros, reflected, got 'wrap'"),
        ({"shift": -1}, "augmentation.shift must be at least 0, got -1"),
        ({"noise": math.nan}, "augmentation.noise must be at least 0 and finite, got nan"),
        ({"strong": "ctaugment", "threshold": 2.0}, r"augmentation.threshold must lie in \[0, 1\], got 2.0"),
        ({"whitening": "pca"}, "augmentation.whitening must be one of none, zca, got 'pca'"),
        ({"whitening": "zca", "strong": "ctaugment"}, "strong must be auto or weak with whitening: .* got 'ctaugment'"),
        ({"shift": 8}, "pixels must lie between 0 and size - 1 = 7, got 8"),
    ],
)
def test_views_name_what_is_wrong(settings, message):
    with pytest.raises(ValueError, match=message):
        views_for("pictures", (3, 8, 8), 8, AugmentationConfig(**settings))


def test_operations_are_of_gray_or_colored_images():
    with pytest.raises(ValueError, match="strong must be auto or weak for images of 4 channels, got 'ctaugment'"):
        views_for("pictures", (4, 8, 8), 8, AugmentationConfig(strong="ctaugment"))
