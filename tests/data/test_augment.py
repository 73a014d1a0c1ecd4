import pytest
import torch
from torch.nn import functional

from fastmeta.data import StrongAugment, load_digits, weak_augment
from fastmeta.data.augment import OPERATIONS


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def images():
    return load_digits().images[:64]


AUGMENTATIONS = {"weak": weak_augment, "strong": StrongAugment()}


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("shape", [(5, 1, 8, 8), (3, 3, 32, 24), (0, 1, 8, 8)])
def test_shape_dtype_and_range_are_kept(name, shape):
    source = torch.rand(shape, generator=generator())
    result = AUGMENTATIONS[name](source, generator())
    assert result.shape == source.shape
    assert result.dtype == source.dtype
    assert bool(((result >= 0) & (result <= 1)).all())


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_generator_decides_and_the_source_is_left_alone(name, images):
    before = images.clone()
    first, again = (AUGMENTATIONS[name](images, generator(1)) for _ in range(2))
    other = AUGMENTATIONS[name](images, generator(2))
    assert first.equal(again)
    assert not first.equal(other)
    assert images.equal(before)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_global_random_state_is_not_touched(name, images):
    state = torch.get_rng_state()
    AUGMENTATIONS[name](images, generator())
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize(("name", "least"), [("weak", 9), ("strong", 64)])
def test_equal_images_get_their_own_operations(name, least, images):
    same = images[:1].expand(64, -1, -1, -1)
    distinct = AUGMENTATIONS[name](same, generator()).flatten(1).unique(dim=0)
    assert len(distinct) >= least


def test_weak_is_a_whole_shift_filled_with_zero(images):
    shifted = weak_augment(images, generator(), max_shift=1)
    padded = functional.pad(images, (1, 1, 1, 1))
    for source, result in zip(padded, shifted, strict=True):
        windows = [source[:, row : row + 8, column : column + 8] for row in range(3) for column in range(3)]
        assert any(result.equal(window) for window in windows)


def test_strength_zero_is_the_identity(images):
    result = StrongAugment(strength=0.0, cutout=0.0)(images, generator())
    assert torch.allclose(result, images, atol=2e-6)


def test_cutout_zeroes_one_square_per_image():
    ones = torch.ones(200, 1, 8, 8)
    result = StrongAugment(strength=0.0, cutout=0.25)(ones, generator())
    assert (result == 0).sum(dim=(1, 2, 3)).tolist() == [4] * 200
    assert len((result == 0).flatten(1).unique(dim=0)) > 40  # of 49 places


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "identity"])
def test_every_operation_changes_an_image_by_itself(operation, images, monkeypatch):
    limits = {name: limit if name == operation else 0.0 for name, limit in OPERATIONS.items()}
    monkeypatch.setattr("fastmeta.data.augment.OPERATIONS", limits)
    augment = StrongAugment(operations_per_image=len(OPERATIONS), cutout=0.0)
    change = (augment(images, generator()) - images).abs().flatten(1).max(dim=1).values
    assert (change > 1e-3).float().mean() > 0.9


def test_shift_moves_by_the_fraction_of_the_side_it_names(monkeypatch):
    # a bright pixel's center of mass moves by the drawn strength, at most 0.2 of 32 pixels
    monkeypatch.setattr(
        "fastmeta.data.augment.OPERATIONS", {name: 0.2 if name == "shift_x" else 0.0 for name in OPERATIONS}
    )
    image = torch.zeros(100, 1, 32, 32)
    image[:, :, 16, 16] = 1
    moved = StrongAugment(operations_per_image=len(OPERATIONS), cutout=0.0)(image, generator())
    columns = torch.arange(32.0)
    place = (moved.sum(dim=(1, 2)) * columns).sum(1) / moved.sum(dim=(1, 2, 3))
    shift = place - 16
    assert shift.abs().max() <= 6.4 + 0.1
    assert shift.min() < -5
    assert shift.max() > 5
