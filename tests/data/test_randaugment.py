"""RandAugment: what is drawn, against the formulas that were published."""

import pytest
import torch
from scipy import stats

from fastmeta.data import KeyedRandom, RandomCrop, Shift
from fastmeta.data.augment import CODES, OPERATIONS, RANDAUGMENT, RandAugment, apply_operations, randaugment
from fastmeta.data.augment.apply import view

NAMES = list(OPERATIONS)
COUNT = 20_000
POINTS = range(1, 10)


def keyed(count, start=0):
    return KeyedRandom(0, "unlabeled", "strong", torch.arange(start, start + count))


def drawn(monkeypatch, preset, size):
    """What 20,000 images draw: arguments of ``view``."""
    seen = []

    def record(images, moves, *drawn, reflected, **colors):
        seen.append((*drawn, colors))
        return images

    monkeypatch.setattr(randaugment, "view", record)
    RandAugment(size, preset)(torch.zeros(COUNT, 1, 1, 1, dtype=torch.uint8).expand(-1, 1, size, size), keyed(COUNT))
    return seen[0]


def either(values):
    return {sign * value for value in values for sign in (1.0, -1.0)}


def published(preset, side):
    """Every level of an operation that is drawn from few."""
    share, factor = (10 / 32, (1.8, 0.1)) if preset == "google" else (0.3, (0.9, 0.05))
    levels = {
        "autocontrast": {1.0},
        "equalize": {1.0},
        "rotate": either(int(v * 30 / 10) for v in POINTS),
        "solarize": {256 - int(v * 256 / 10) for v in POINTS},
        "posterize": {4 - int(v * 4 / 10) for v in POINTS}
        if preset == "google"
        else {int(v * 4 / 10) + 4 for v in POINTS},
    }
    levels |= {name: {v * factor[0] / 10 + factor[1] for v in POINTS} for name in ("color", "contrast")}
    levels |= {name: {v * factor[0] / 10 + factor[1] for v in POINTS} for name in ("brightness", "sharpness")}
    levels |= {name: either(v * 0.3 / 10 for v in POINTS) for name in ("shear-x", "shear-y")}
    return levels | {
        name: either(int(v * share / 10 * side) for v in POINTS) for name in ("translate-x", "translate-y")
    }


@pytest.mark.parametrize(("preset", "size"), [("google", 32), ("paper", 32), ("paper", 49), ("google", 64)])
def test_two_operations_with_the_published_levels(preset, size, monkeypatch):
    operations, levels, places, colors = drawn(monkeypatch, preset, size)
    assert operations.shape == (COUNT, 3)
    assert colors == {"fill": 127 if preset == "google" else 0, "square": (127, 127, 127)}
    counts = operations[:, :2].flatten().bincount(minlength=len(NAMES))
    each = torch.full(
        (14,), COUNT / 14, dtype=torch.float64
    )  # half of the two that each draws is left out, which is the identity
    each[0] += COUNT
    assert stats.chisquare(counts[:14], each).pvalue > 1e-5
    assert int(counts[14:].sum()) == 0
    for name, values in published(preset, size).items():
        mine = levels[:, :2][operations[:, :2] == CODES[name]]
        assert sorted(set(mine.tolist())) == sorted(set(torch.tensor(sorted(values)).tolist())), name
    assert operations[:, 2].unique().tolist() == [CODES["cutout"]]
    assert levels[:, 2].unique().tolist() == [size / 2]
    # the middle of the square
    first = places[:, 2, 0]
    if preset == "google":
        assert stats.chisquare(first.long().bincount(minlength=size)).pvalue > 1e-5
        assert first.equal(first.floor())
    else:
        assert stats.kstest((first / size).numpy(), "uniform").pvalue > 1e-5


def test_three_of_any_strength(monkeypatch):
    operations, levels, places, colors = drawn(monkeypatch, "usb", 40)
    assert operations.shape == (COUNT, 4)
    assert colors == {"fill": 0, "square": (125, 123, 114)}
    assert stats.chisquare(operations[:, :3].flatten().bincount(minlength=14)).pvalue > 1e-5
    ranges = {"rotate": (-30, 30), "solarize": (0, 256), "shear-x": (-0.3, 0.3), "shear-y": (-0.3, 0.3)}
    ranges |= dict.fromkeys(("color", "contrast", "brightness", "sharpness"), (0.05, 0.95))
    ranges |= dict.fromkeys(("translate-x", "translate-y"), (-12, 12))
    for name, (low, high) in ranges.items():
        mine = levels[:, :3][operations[:, :3] == CODES[name]]
        assert stats.kstest(mine.numpy(), "uniform", (low, high - low)).pvalue > 1e-5, name
    bits = levels[:, :3][operations[:, :3] == CODES["posterize"]]
    assert stats.chisquare(bits.long().bincount(minlength=8)[4:]).pvalue > 1e-5
    assert stats.kstest(levels[:, 3].numpy(), "uniform", (0, 20)).pvalue > 1e-5
    assert stats.kstest(places[:, 3].flatten().numpy(), "uniform", (0, 40)).pvalue > 1e-5


@pytest.mark.parametrize("weak", [Shift(32, 4, "reflected", flip=True), Shift(32, 9), RandomCrop(32)], ids=str)
@pytest.mark.parametrize("preset", RANDAUGMENT)
def test_the_weak_view_comes_first_and_8_bits_between(preset, weak, monkeypatch):
    images = torch.randint(0, 256, (50, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    both = RandAugment(32, preset, weak)(images, keyed(50))
    random, seen = keyed(50), []
    shifted = (weak(images, random) * 255).round().to(torch.uint8)

    def watched(*arguments, reflected, **colors):
        seen.append((arguments, colors))
        return view(*arguments, reflected=reflected, **colors)

    monkeypatch.setattr(randaugment, "view", watched)
    assert RandAugment(32, preset)(shifted, random).equal(both)
    (_, _, *drawn), colors = seen[0]
    assert both.equal(apply_operations(shifted, *drawn, **colors).float() / 255)


def test_there_is_no_other_preset():
    with pytest.raises(ValueError, match="preset must be one of google, paper, usb, got 'torchvision'"):
        RandAugment(32, "torchvision")
