import numpy as np
import pytest
import torch

from fastmeta.data import DataError, open_images

RNG = np.random.default_rng(0)


def _pixels(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def _save(tmp_path, **arrays):
    np.savez(tmp_path / "data.npz", **arrays)
    return tmp_path / "data.npz"


def test_images_and_labels(tmp_path):
    pixels = _pixels(4, 6, 5, 3)
    images = open_images(_save(tmp_path, images=pixels, labels=np.array([2, 0, -1, 1])))
    assert images.image_shape == (3, 6, 5)
    assert images.get(torch.tensor([3, 0])).numpy().tolist() == pixels[[3, 0]].transpose(0, 3, 1, 2).tolist()
    assert images.classes == ("0", "1", "2")
    assert images.targets.tolist() == [2, 0, -1, 1]
    assert images.describe(2) == "data.npz[2]"


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [
        (("images", "labels"), ("validation_images", "validation_labels"), ("test_images", "test_labels")),
        (("train_images", "train_labels"), ("val_images", "val_labels"), ("test_images", "test_labels")),
        (("x_train", "y_train"), ("x_val", "y_val"), ("x_test", "y_test")),
    ],
)
def test_parts_under_the_names_that_are_used(tmp_path, train, validation, test):
    arrays = {"unlabeled_images": _pixels(2, 8, 8)}
    for count, (images, labels) in zip((3, 1, 2), (train, validation, test), strict=True):
        arrays |= {images: _pixels(count, 8, 8), labels: np.arange(count, dtype=np.uint8)[:, None]}
    images = open_images(_save(tmp_path, **arrays))
    assert {part: places.tolist() for part, places in images.parts.items()} == {
        "train": [0, 1, 2],
        "unlabeled": [3, 4],
        "validation": [5],
        "test": [6, 7],
    }
    assert images.targets.tolist() == [0, 1, 2, -1, -1, 0, 0, 1]
    assert images.get(torch.tensor([7]))[0, 0].numpy().tolist() == arrays[test[0]][1].tolist()
    assert images.describe(7) == f"data.npz:{test[0]}[1]"


def test_numbers_are_places_where_classes_are_called_by_other_numbers(tmp_path):
    images, classes = np.zeros((3, 4, 4), np.uint8), ["1", "2", "0"]
    assert open_images(_save(tmp_path, images=images, labels=[0, 2, 1], classes=classes)).targets.tolist() == [0, 2, 1]
    named = _save(tmp_path, images=images, labels=["0", "2", "1"], classes=classes)
    assert open_images(named).targets.tolist() == [2, 1, 0]


def test_named_classes_and_floats(tmp_path):
    path = _save(
        tmp_path, images=np.linspace(0, 1, 32).reshape(2, 1, 4, 4), labels=["b", "a"], classes=["a", "b", "never"]
    )
    images = open_images(path)
    assert images.classes == ("a", "b", "never")
    assert images.targets.tolist() == [1, 0]
    assert images.get(torch.arange(2)).dtype == torch.float32


def test_another_size_and_other_colours(tmp_path):
    path = _save(tmp_path, images=np.full((2, 20, 30), 7), labels=[0, 1])
    images = open_images(path, image_size=12, mode="RGB", cache=False)
    assert images.image_shape == (3, 12, 12)
    assert (images.get(torch.arange(2)) == 7).all()
    assert images.describe(1) == "data.npz[1]"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": _pixels(2, 8, 8)}, "must hold the arrays images and labels, got pictures"),
        ({"images": _pixels(2, 8, 8)}, "must hold labels for images, got none"),
        (
            {"images": _pixels(2, 8, 8), "labels": [0]},
            "the labels of images must be 2 whole numbers or names, got int",
        ),
        ({"images": _pixels(2, 8, 8), "labels": [0.0, 1.0]}, "must be 2 whole numbers or names, got float64"),
        ({"images": _pixels(2, 8, 8, 4), "labels": [0, 1]}, r"images must be images \[N, height, width\], with 1 or 3"),
        ({"images": np.full((2, 8, 8), 2.0), "labels": [0, 1]}, r"in \[0, 1\], got float64 from 2.0 to 2.0"),
        ({"images": np.full((2, 8, 8), 256), "labels": [0, 1]}, "whole numbers from 0 to 255 .* from 256 to 256"),
        (
            {"images": _pixels(2, 8, 8), "labels": [0, 1], "test_images": _pixels(2, 9, 8), "test_labels": [0, 1]},
            r"test_images must be as images, torch.uint8 \[1, 8, 8\], got torch.uint8 \[1, 9, 8\]",
        ),
        (
            {"images": _pixels(2, 8, 8), "labels": [0, 1], "test_images": _pixels(1, 8, 8), "test_labels": [2]},
            r"test_images\[0\]: label '2' is no class of the train part, expected one of 0, 1",
        ),
        (
            {"images": _pixels(2, 8, 8), "labels": [0, 3], "classes": ["a", "b"]},
            r"data.npz\[1\]: label '3' is no class, expected one of 2",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path, arrays, message):
    with pytest.raises(DataError, match=message):
        open_images(_save(tmp_path, **arrays))


def test_objects_are_not_loaded(tmp_path):
    path = _save(tmp_path, images=np.array([{}, {}], dtype=object), labels=[0, 1])
    with pytest.raises(DataError, match="images holds Python objects, which are not loaded"):
        open_images(path)


def test_what_is_no_npz(tmp_path):
    (tmp_path / "data.npz").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"data.npz: must be an npz file"):
        open_images(tmp_path / "data.npz")
