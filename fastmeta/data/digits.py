"""The 1,797 handwritten digits that ship with scikit-learn: real images, no network."""

import functools

import torch
from torch import Tensor

from fastmeta.data.images import ImageDataset
from fastmeta.data.split import Split, make_split


def load_digits() -> ImageDataset:
    """Handwritten digits, ``[1797, 1, 8, 8]``, ten classes of about 180 images each.

    Raises:
        ImportError: scikit-learn is not installed.

    >>> len(load_digits())
    1797
    """
    counts, targets = _stored()
    return ImageDataset("digits", counts.float().div_(16).unsqueeze(1), targets.clone(), 10)


@functools.cache  # it is read from text, in 0.1 s
def _stored() -> tuple[Tensor, Tensor]:
    """Counts of ink in 0 .. 16, float64 ``[1797, 8, 8]``, and the targets."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise ImportError("the digits ship with scikit-learn: pip install scikit-learn") from error
    bunch = load()
    return torch.from_numpy(bunch.images), torch.from_numpy(bunch.target)


def split_digits(digits: ImageDataset, labels_per_class: int, seed: int) -> Split:
    """The split of every figure on digits here: 3 hold-out and 20 validation images a class, a quarter for test.

    >>> split_digits(load_digits(), labels_per_class=1, seed=0).sizes()
    {'labeled': 10, 'unlabeled': 1107, 'holdout': 30, 'validation': 200, 'test': 450}
    """
    return make_split(
        digits,
        labels_per_class=labels_per_class,
        seed=seed,
        holdout_per_class=3,
        validation_per_class=20,
        test_fraction=0.25,
    )
