"""Views: their range, what an image may become, and that nothing beside it decides a bit of it."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats
from sklearn.datasets import load_digits
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from fastmeta.data import (
    KeyedRandom,
    Plain,
    RandomCrop,
    Shift,
    StrongAugment,
    StrongPicture,
    weak_augment,
)
from fastmeta.data.augment import RandAugment, crop, pictures, strong
from fastmeta.data.augment.affine import affine_map, mirrored, warp
from fastmeta.data.augment.pixels import centre, gray, mean_of, noise


def random(count=64, seed=0, view="weak", start=0):
    return KeyedRandom(seed, "unlabeled", view, torch.arange(start, start + count))


@pytest.fixture(scope="module")
def digits():
    return torch.from_numpy(load_digits().images[:64]).float().div_(16).unsqueeze(1)


def pixels(*shape, dtype=torch.uint8, seed=0):
    drawn = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return drawn if dtype == torch.uint8 else drawn.to(dtype) / 255


AUGMENTATIONS = {
    "shift": Shift(8, 1),
    "reflected": Shift(32, 4, "reflected", flip=True),
    "crop": RandomCrop(21),
    "strong": StrongAugment(8),
    "strong 13": StrongAugment(13),
    "picture": StrongPicture(32),
    "picture 13": StrongPicture(13, operations_per_image=5),
    "cropped picture": StrongPicture(21, crop=RandomCrop(21)),
    "plain": Plain(21),
    "unmirrored crop": RandomCrop(21, flip=False),
    "unmirrored picture": StrongPicture(13, flip=False),
    "randaugment": RandAugment(32, "google", Shift(32, 4, "reflected", flip=True)),
    "randaugment 13": RandAugment(13, "usb"),
    "cropped randaugment": RandAugment(21, "paper", RandomCrop(21)),
}
SHAPES = {
    "same": lambda size: (size, size),
    "larger": lambda size: (size + 5, size + 9),
    "smaller": lambda size: (5, 7),
}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_any_image_becomes_float32_of_the_size_in_unit_range(name, shape, dtype):
    augmentation = AUGMENTATIONS[name]
    side = augmentation.size
    four = [] if isinstance(augmentation, RandAugment) else [(2, 4)]
    for count, channels in [(3, 1), (2, 3), (0, 3), *four]:
        source = pixels(count, channels, *SHAPES[shape](side), dtype=dtype)
        before = source.clone()
        result = augmentation(source, random(count))
        assert result.shape == (count, channels, side, side)
        assert result.dtype == torch.float32
        assert bool(((result >= 0) & (result <= 1)).all())
        assert source.equal(before)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_no_bit_depends_on_other_rows_or_on_threads(name, shape, dtype):
    augmentation, side = AUGMENTATIONS[name], AUGMENTATIONS[name].size
    source = pixels(67, 3, *SHAPES[shape](side), dtype=dtype)
    whole = augmentation(source, random(67))
    for start, stop in [(0, 1), (1, 2), (66, 67), (3, 20), (20, 67)]:
        assert augmentation(source[start:stop], random(stop - start, start=start)).equal(whole[start:stop])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert augmentation(source, random(67)).equal(whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", [name for name in AUGMENTATIONS if name != "plain"])
def test_keys_decide_and_nothing_else(name, digits):
    state = torch.get_rng_state()
    first, again, seed, view = (
        AUGMENTATIONS[name](digits, random(**key)) for key in ({}, {}, {"seed": 1}, {"view": "b"})
    )
    assert first.equal(again)
    assert not first.equal(seed)
    assert not first.equal(view)
    assert torch.get_rng_state().equal(state)


class NothingRead(TorchDispatchMode):
    """Fails where a GPU's host would wait: a value is read, or a shape depends on values."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        assert function.name() not in {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"}
        return function(*arguments, **keywords or {})


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_host_waits_for_nothing(name):
    source = pixels(5, 3, 40, 50)
    with NothingRead():
        AUGMENTATIONS[name](source, random(5))


@pytest.mark.parametrize(("name", "least"), [("shift", 9), ("reflected", 45), ("strong", 64), ("picture", 64)])
def test_equal_images_get_their_own_operations(name, least, digits):
    same = digits[:1].expand(64, -1, -1, -1)
    assert len(AUGMENTATIONS[name](same, random()).flatten(1).unique(dim=0)) >= least


def windows(padded, size):
    """Every ``size`` by ``size`` window of an image, by its shift."""
    count = padded.shape[-1] - size + 1
    return {(y, x): padded[:, y : y + size, x : x + size] for y in range(count) for x in range(count)}


def test_shift_is_one_of_nine_drawn_evenly_filled_with_zero():
    image = pixels(1, 3, 8, 8)
    shifted = Shift(8, 1)(image.expand(3600, -1, -1, -1), random(3600))
    expected = windows(functional.pad(image[0].float() / 255, (1, 1, 1, 1)), 8)
    counts = [int((shifted == window).flatten(1).all(dim=1).sum()) for window in expected.values()]
    assert sum(counts) == 3600
    assert stats.chisquare(counts).pvalue > 1e-4


def test_reflected_shift_and_flip_are_drawn_evenly():
    image = pixels(1, 3, 8, 8)
    shifted = Shift(8, 2, "reflected", flip=True)(image.expand(4000, -1, -1, -1), random(4000))
    counts = []
    for source in (image[0], image[0].flip(2)):
        padded = functional.pad(source.float().unsqueeze(0) / 255, (2, 2, 2, 2), mode="reflect")[0]
        counts += [int((shifted == window).flatten(1).all(dim=1).sum()) for window in windows(padded, 8).values()]
    assert sum(counts) == 4000
    assert stats.chisquare(counts).pvalue > 1e-4


def test_largest_shift_reflects_the_whole_image():
    Shift(4, 3, "reflected", flip=True)(pixels(200, 1, 4, 4), random(200))
    with pytest.raises(ValueError, match="pixels must lie between 0 and size - 1 = 3, got 4"):
        Shift(4, 4)


def test_shift_of_a_generator(digits):
    generator = torch.Generator().manual_seed(0)
    shifted = weak_augment(digits, generator)
    assert not shifted.equal(digits)
    for source, result in zip(functional.pad(digits, (1, 1, 1, 1)), shifted, strict=True):
        assert any(result.equal(window) for window in windows(source, 8).values())
    assert weak_augment(digits[:0], generator).shape == (0, 1, 8, 8)


def test_crops_have_the_drawn_areas_and_ratios():
    # the two channels hold x and y, so a crop's corner pixels tell where they come from
    height, width = 60, 80
    y, x = torch.meshgrid(torch.arange(60.0) / 80, torch.arange(80.0) / 80, indexing="ij")
    source = torch.stack([x, y]).expand(2000, -1, -1, -1)
    result = RandomCrop(56, area=(0.25, 0.75), ratio=(0.8, 1.25))(source, random(2000)) * 80
    inner = result[:, :, 14:42, 14:42]  # nothing lies outside of the outermost pixels' centres
    wide = (inner[:, 0, 0, -1] - inner[:, 0, 0, 0]) * 56 / 27
    tall = (inner[:, 1, -1, 0] - inner[:, 1, 0, 0]) * 56 / 27
    share = wide.abs() * tall / (height * width)
    assert 0.24 < share.min() < 0.27
    assert 0.72 < share.max() < 0.76
    assert 0.79 < (wide.abs() / tall).min() < 0.85
    assert 1.2 < (wide.abs() / tall).max() < 1.26
    assert 900 < int((wide < 0).sum()) < 1100
    left = inner[:, 0].mean(dim=(1, 2)) - wide.abs() / 2
    top = inner[:, 1].mean(dim=(1, 2)) - tall / 2
    assert -0.6 < left.min() < 1
    assert -0.6 < top.min() < 1
    assert 79 < (left + wide.abs()).max() < 80
    assert 59 < (top + tall).max() < 60


@pytest.mark.parametrize("impl", crop.OPERATOR.implementations())
def test_a_crop_of_bytes_is_the_warp(impl):
    source, size = pixels(40, 3, 30, 41), 24
    maps = RandomCrop(size, area=(0.05, 1.0)).maps(source, random(40))
    maps[0] = torch.tensor([[1.0, 0, 0], [0, 1, 0]])  # the whole
    maps[1] = torch.tensor([[-1.0, 0, 0.7], [0, 1, -0.7]])  # more than there is
    arguments = maps[:, :, 2], maps[:, :, :2].diagonal(dim1=1, dim2=2), size
    result = crop.crop(source, *arguments, impl=impl)
    torch.testing.assert_close(result, warp(source, maps, (size, size), fill=None), atol=1e-5, rtol=0)
    assert result.equal(crop.crop(source, *arguments, impl="reference"))
    nearest = crop.crop(source, *arguments, unit=False, impl=impl)
    assert nearest.equal((result * 255).round().to(torch.uint8))
    one = crop.crop(source[5:6], *(each[5:6] for each in arguments[:2]), size, impl=impl)
    assert one.equal(result[5:6])
    assert crop.crop(source[:0], *(each[:0] for each in arguments[:2]), size, impl=impl).shape == (0, 3, size, size)


def test_maps_compose_as_matrices_and_warp_is_torch_s():
    generator = torch.Generator().manual_seed(0)
    names = ("rotate", "stretch", "shear_x", "shear_y", "shift_x", "shift_y")
    drawn = {name: torch.rand(5, generator=generator) - 0.5 for name in names}
    maps = mirrored(affine_map(drawn), torch.tensor([True, False, True, False, False]))
    images = torch.rand(5, 3, 9, 12, generator=generator)
    for row in range(5):
        one = {name: strength[row].item() for name, strength in drawn.items()}
        cosine, sine = math.cos(one["rotate"]), math.sin(one["rotate"])
        turned = torch.tensor([[cosine, -sine], [sine, cosine]]) * math.exp(one["stretch"])
        sheared = torch.tensor([[1, one["shear_x"]], [one["shear_y"], 1]])
        linear = turned @ sheared @ torch.diag(torch.tensor([-1.0 if row in (0, 2) else 1.0, 1.0]))
        expected = torch.cat([linear, torch.tensor([[2 * one["shift_x"]], [2 * one["shift_y"]]])], dim=1)
        torch.testing.assert_close(maps[row], expected)
    grid = functional.affine_grid(maps, [5, 3, 9, 12], align_corners=False)
    expected = functional.grid_sample(images, grid, align_corners=False)
    torch.testing.assert_close(warp(images, maps, (9, 12), fill=0.0), expected, atol=1e-5, rtol=0)
    border = functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    torch.testing.assert_close(warp(images, maps, (9, 12), fill=None), border, atol=1e-5, rtol=0)
    inside = functional.grid_sample(torch.ones_like(images), grid, align_corners=False)
    filled = warp(images, maps, (9, 12), fill=0.5)
    torch.testing.assert_close(filled, expected + 0.5 * (1 - inside), atol=1e-5, rtol=0)


@pytest.mark.parametrize("augmentation", [StrongAugment(8, strength=0.0, cutout=0.0), StrongPicture(8, 2, 0.0, 0.0)])
def test_strength_zero_is_the_identity_or_its_mirror_image(augmentation, digits):
    result = augmentation(digits, random())
    same = (result - digits).abs().amax(dim=(1, 2, 3)) < 1e-5
    mirrored_image = (result - digits.flip(3)).abs().amax(dim=(1, 2, 3)) < 1e-5
    assert bool((same | mirrored_image).all())
    assert int(same.sum()) == 64 if isinstance(augmentation, StrongAugment) else 15 < int(same.sum()) < 49


def test_strength_zero_of_a_cropped_picture_is_the_crop():
    crop = RandomCrop(16)
    source = pixels(64, 3, 20, 24)
    result = StrongPicture(16, strength=0.0, cutout=0.0, crop=crop)(source, random())
    draws = random()
    flip = draws.uniform(2 * len(pictures.OPERATIONS) + 3)[:, -1] < 0.5
    expected = crop(source, draws)
    expected = torch.where(flip.view(-1, 1, 1, 1), expected.flip(3), expected)
    # gray comes in at the picture's border
    torch.testing.assert_close(result[:, :, 2:-2, 2:-2], expected[:, :, 2:-2, 2:-2], atol=1e-4, rtol=0)


def test_crop_comes_after_the_operations():
    crop = torch.tensor([[[0.5, 0, 0.2], [0, 0.7, -0.1]]])
    maps = torch.rand(1, 2, 3, generator=torch.Generator().manual_seed(0))
    last = torch.tensor([[[0.0, 0, 1]]])
    expected = torch.cat([crop, last], dim=1) @ torch.cat([maps, last], dim=1)
    torch.testing.assert_close(pictures._after(crop, maps), expected[:, :2])


@pytest.mark.parametrize(("augmentation", "value"), [(StrongAugment, 0.0), (StrongPicture, 0.5)])
def test_cutout_is_one_square_per_image(augmentation, value):
    ones = torch.ones(200, 1, 8, 8)
    result = augmentation(8, strength=0.0, cutout=0.25)(ones, random(200))
    cut = result == value
    assert cut.sum(dim=(1, 2, 3)).tolist() == [4] * 200
    assert len(cut.flatten(1).unique(dim=0)) > 40  # of 49 places
    assert bool(((result - 1).abs() < 1e-5)[~cut].all())


@pytest.mark.parametrize("module", [strong, pictures])
def test_operations_are_drawn_evenly_and_uniform_up_to_their_limits(module, monkeypatch):
    drawn = {}

    def record(images, strengths, *rest):
        drawn.update(strengths)
        return images

    monkeypatch.setattr(module, "_shade" if module is strong else "_shade_", record)
    augmentation = StrongAugment(8) if module is strong else StrongPicture(8)
    augmentation(torch.zeros(4000, 1, 8, 8), random(4000))
    assert list(drawn) == list(module.OPERATIONS)
    share = augmentation.operations_per_image / len(drawn)
    for name, limit in module.OPERATIONS.items():
        strengths = drawn[name].flatten()
        chosen = strengths[strengths != 0]
        if limit == 0:
            continue
        assert abs(len(chosen) / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5
        assert stats.kstest((chosen / limit).numpy(), "uniform", (-1, 2)).pvalue > 1e-4
    several = torch.stack([strength.flatten() != 0 for strength in drawn.values()]).sum(dim=0)
    assert int(several.max()) == augmentation.operations_per_image


@pytest.mark.parametrize(("module", "augmentation"), [(strong, StrongAugment), (pictures, StrongPicture)])
def test_every_operation_changes_an_image_by_itself(module, augmentation, monkeypatch):
    source = pixels(64, 3, 8, 8)
    operations = dict(module.OPERATIONS)
    for operation in operations:
        limits = {name: limit if name == operation else 0.0 for name, limit in operations.items()}
        monkeypatch.setattr(module, "OPERATIONS", limits)
        result = augmentation(8, operations_per_image=len(limits), cutout=0.0)(source, random())
        plain = source.float() / 255
        changed = torch.minimum(*((result - other).abs().amax(dim=(1, 2, 3)) for other in (plain, plain.flip(3))))
        assert (changed > 1e-3).float().mean() > 0.85 or operation == "identity"
        assert operation != "identity" or float(changed.max()) < 1e-5


def test_shift_moves_by_the_fraction_of_the_side_it_names(monkeypatch):
    # a bright pixel's center of mass moves by the drawn strength, at most 0.2 of 32 pixels
    monkeypatch.setattr(strong, "OPERATIONS", {name: 0.2 * (name == "shift_x") for name in strong.OPERATIONS})
    image = torch.zeros(100, 1, 32, 32)
    image[:, :, 16, 16] = 1
    moved = StrongAugment(32, operations_per_image=len(strong.OPERATIONS), cutout=0.0)(image, random(100))
    place = (moved.sum(dim=(1, 2)) * torch.arange(32.0)).sum(1) / moved.sum(dim=(1, 2, 3))
    shift = place - 16
    assert shift.abs().max() <= 6.4 + 0.1
    assert shift.min() < -5
    assert shift.max() > 5


def shaded(image, **strengths):
    every = {name: torch.full((1, 1, 1, 1), strengths.get(name, 0.0)) for name in pictures.OPERATIONS}
    return pictures._shade_(image.unsqueeze(0).float() / 255, every)[0]


PILLOW = {
    "brightness": lambda image, strength: ImageEnhance.Brightness(image).enhance(1 + strength),
    "color": lambda image, strength: ImageEnhance.Color(image).enhance(1 + strength),
    "contrast": lambda image, strength: ImageEnhance.Contrast(image).enhance(1 + strength),
    "solarize": lambda image, strength: ImageOps.solarize(image, math.floor(255 * (1 - abs(strength))) + 1),
}


@pytest.mark.parametrize("strength", [-0.7, 0.01, 0.61])
@pytest.mark.parametrize("operation", PILLOW)
def test_shades_are_pillow_s(operation, strength):
    image = pixels(3, 16, 16)
    expected = PILLOW[operation](Image.fromarray(image.permute(1, 2, 0).numpy()), strength)
    expected = torch.from_numpy(np.asarray(expected).copy()).permute(2, 0, 1).float()
    # Pillow rounds the mean and each result to 8 bits
    torch.testing.assert_close(shaded(image, **{operation: strength}) * 255, expected, atol=1.6, rtol=0)


def test_shades_compose_as_one_after_another():
    image = (pixels(3, 16, 16) // 4) + 96  # far from both ends, so that nothing is cut
    one_by_one = image
    for operation, strength in [("brightness", 0.1), ("color", -0.5), ("contrast", 0.3)]:
        one_by_one = shaded(one_by_one, **{operation: strength}) * 255
    together = shaded(image, brightness=0.1, color=-0.5, contrast=0.3) * 255
    torch.testing.assert_close(together, one_by_one, atol=0.05, rtol=0)


def test_digits_shade_is_its_definition(digits):
    strengths = {name: torch.full((64, 1, 1, 1), 0.3) for name in strong.OPERATIONS}
    offset = random().uniform(1)[:, 0]
    result = strong._shade(digits, strengths, offset)
    mean = digits.mean(dim=(1, 2, 3), keepdim=True)
    expected = ((digits - mean) * math.exp(0.3) + mean + 0.3).clamp(1e-6, 1) ** math.exp(0.3)
    expected = (expected + 0.3 * noise(digits.shape, offset)).clamp(0, 1)
    torch.testing.assert_close(result, expected, atol=1e-3, rtol=0)  # the mean is of 12 bits


def test_mean_and_luma():
    images = torch.rand(5, 3, 31, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mean_of(images), images.mean(dim=(1, 2, 3), keepdim=True), atol=2**-12, rtol=0)
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    torch.testing.assert_close(gray(images), (images * weights).sum(1, keepdim=True))
    torch.testing.assert_close(gray(images[:, :2]), images[:, :2].mean(1, keepdim=True))


def test_mean_of_a_large_image_depends_on_neither_threads_nor_rows():
    images = torch.rand(20, 1, 224, 224, generator=torch.Generator().manual_seed(0))
    whole, threads = mean_of(images), torch.get_num_threads()
    try:
        torch.set_num_threads(3)  # torch splits the sum of a single image, not those of several
        assert torch.cat([mean_of(image.unsqueeze(0)) for image in images]).equal(whole)
    finally:
        torch.set_num_threads(threads)


def test_noise_is_gaussian_and_unrelated_between_examples():
    drawn = noise(torch.Size([2000, 1, 4, 4]), random(2000).uniform(1)[:, 0]).flatten(1)
    assert stats.kstest(drawn[:, 0].numpy(), "norm").pvalue > 1e-4
    assert stats.kstest(drawn[:, 9].numpy(), "norm").pvalue > 1e-4
    correlation = torch.corrcoef(drawn.T) - torch.eye(16)
    assert correlation.abs().max() < 0.1
    assert torch.corrcoef(torch.stack([drawn[:-1].flatten(), drawn[1:].flatten()]))[0, 1].abs() < 0.03


def test_plain_is_the_middle():
    stored = pixels(2, 3, 256, 300)
    expected = stored[:, :, 16:240, 38:262].float() / 255
    assert Plain(224)(stored).equal(expected)
    small = pixels(2, 3, 32, 32)
    assert Plain(32)(small).equal(small.float() / 255)
    ramp = torch.linspace(0, 1, 128).expand(1, 1, 64, 128)
    halved = centre(ramp, 32)
    torch.testing.assert_close(halved[0, 0, 5], torch.linspace(0, 1, 64)[16:48], atol=0.01, rtol=0)
