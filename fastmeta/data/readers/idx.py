"""MNIST and Fashion-MNIST in files of bytes with their sizes before them, packed or not."""

from collections.abc import Mapping
from functools import partial

import numpy as np

from fastmeta.data.images import DataError, ImageDataset
from fastmeta.data.readers.original import Original, train_and_test

_PARTS = {"train": "train", "t10k": "test"}
_FILES = tuple(f"{part}-{kind}" for part in _PARTS for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))
_BYTES = 8  # the kind of unsigned bytes


def read_idx(file: str, content: bytes, dimensions: int) -> np.ndarray:
    """The array in a file: two bytes of 0, the kind, the number of dimensions, their sizes, and the bytes.

    Raises:
        DataError: it is no such file, or is cut off.

    >>> read_idx("labels", bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9]), 1)
    array([7, 9], dtype=uint8)
    """
    start = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, _BYTES, dimensions]) or len(content) < start:
        raise DataError(f"{file}: must be an idx file of bytes in {dimensions} dimensions, got {content[:4].hex()}")
    shape = np.frombuffer(content, ">u4", dimensions, 4).tolist()
    values = np.frombuffer(content, np.uint8, offset=start)
    if len(values) != np.prod(shape):
        raise DataError(f"{file}: must have {np.prod(shape)} bytes after its sizes, got {len(values)}")
    return values.reshape(shape)


def _read(name: str, classes: tuple[str, ...], content: Mapping[str, bytes]) -> ImageDataset:
    pieces = {}
    for part in _PARTS:
        images, labels = f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"
        pieces[part] = (read_idx(images, content[images], 3)[:, None], read_idx(labels, content[labels], 1))
    return train_and_test(name, classes, pieces, _PARTS)


def _original(name: str, classes: tuple[str, ...], url: str, sums: tuple[str, ...], folder: str) -> Original:
    md5 = {f"{file}.gz": value for file, value in zip(_FILES, sums, strict=True)} if sums else {}
    return Original(name, len(classes), _FILES, url, partial(_read, name, classes), folders=(folder,), md5=md5)


FASHION_MNIST = _original(
    "fashion-mnist",
    ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    (
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    ),
    "FashionMNIST/raw",
)
MNIST = _original("mnist", tuple("0123456789"), "https://ossci-datasets.s3.amazonaws.com/mnist/", (), "MNIST/raw")
