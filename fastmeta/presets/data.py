"""The data sets of the papers, and where they come from."""

from pathlib import Path
from typing import NamedTuple


class DataSet(NamedTuple):
    """A data set that presets are for."""

    classes: int
    source: str  # its folder, and how to get it


DATA_SETS = {
    "cifar-10": DataSet(10, "cifar-10-python.tar.gz, or unpacked, from https://www.cs.toronto.edu/~kriz/cifar.html"),
    "cifar-100": DataSet(100, "cifar-100-python.tar.gz, or unpacked, from https://www.cs.toronto.edu/~kriz/cifar.html"),
    "svhn": DataSet(10, "train_32x32.mat and test_32x32.mat from http://ufldl.stanford.edu/housenumbers"),
    "svhn-extra": DataSet(
        10, "train_32x32.mat, extra_32x32.mat and test_32x32.mat from http://ufldl.stanford.edu/housenumbers"
    ),
    "fashion-mnist": DataSet(10, "the four *-ubyte.gz of https://github.com/zalandoresearch/fashion-mnist"),
    "tiny-imagenet": DataSet(200, "tiny-imagenet-200.zip, unpacked, from http://cs231n.stanford.edu"),
    "imagenet": DataSet(1000, "train/<class>/ and val/<class>/, or the hub's parquet shards, of https://image-net.org"),
    "imagenet-72": DataSet(1000, "train/<class>/ and val/<class>/ of https://image-net.org; pictures of any size"),
}


def require_data(data: str, name: str, dataset: str) -> None:
    """Raise unless ``data`` says where the images of a preset are.

    Raises:
        ValueError: it is the name of the data set, as presets have it, and no such folder is there.

    >>> require_data("cifar-10", "l2i-v2-mt-cifar10-250", "cifar-10")
    Traceback (most recent call last):
    ValueError: data must be where cifar-10 is for preset l2i-v2-mt-cifar10-250, got none: a folder with \
cifar-10-python.tar.gz, or unpacked, from https://www.cs.toronto.edu/~kriz/cifar.html
    """
    if data == dataset and not Path(data).exists():
        raise ValueError(
            f"data must be where {dataset} is for preset {name}, got none: a folder with {DATA_SETS[dataset].source}"
        )
