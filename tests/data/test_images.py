import pickle

import pytest
import torch

from fastmeta.data import ImageDataset, UnreadableImage, load_digits


def test_digits_are_the_whole_data_set_in_unit_range():
    digits = load_digits()
    assert digits.image_shape == (1, 8, 8)
    assert len(digits) == 1797
    assert (digits.images.min().item(), digits.images.max().item()) == (0.0, 1.0)
    assert digits.targets.bincount().min() > 170


def test_what_does_not_fit_is_refused():
    images = torch.zeros(2, 1, 8, 8)
    with pytest.raises(ValueError, match=r"images must be uint8 or floating point .* got torch.int64 \[2, 1, 8, 8\]"):
        ImageDataset("x", images.long(), torch.zeros(2, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match=r"targets must be int64 \[2\], got torch.float32 \[2\]"):
        ImageDataset("x", images, torch.zeros(2), 2)
    with pytest.raises(ValueError, match=r"targets must lie in \[0, 2\), or be -1 where there is no label, got 0 to 2"):
        ImageDataset("x", images, torch.tensor([0, 2]), 2)
    with pytest.raises(ValueError, match="parts must be among train, unlabeled, validation, test, got 'val'"):
        ImageDataset("x", images, torch.tensor([0, 1]), 2, {"val": torch.tensor([0])})
    with pytest.raises(ValueError, match=r"parts must hold places in \[0, 2\), got train up to 2"):
        ImageDataset("x", images, torch.tensor([0, 1]), 2, {"train": torch.tensor([2])})


def test_an_unreadable_image_comes_out_of_a_worker():
    error = pickle.loads(pickle.dumps(UnreadableImage(3, "cat/é 1.jpg", "truncated")))
    assert str(error) == "cat/é 1.jpg: truncated"
    assert (error.place, error.description, error.cause) == (3, "cat/é 1.jpg", "truncated")
