"""The 1,797 handwritten digits that ship with scikit-learn: real images, no network."""

import torch

from fastmeta.data.dataset import ImageDataset


def load_digits() -> ImageDataset:
    """Handwritten digits, ``[1797, 1, 8, 8]``, ten classes of about 180 images each.

    Raises:
        ImportError: scikit-learn is not installed.

    >>> len(load_digits())
    1797
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise ImportError("the digits ship with scikit-learn: pip install scikit-learn") from error
    bunch = load()
    images = torch.from_numpy(bunch.images).float().div_(16).unsqueeze(1)  # stored as ink counts 0..16
    return ImageDataset("digits", images, torch.from_numpy(bunch.target).long(), 10)
