"""Street View House Numbers, format 2 (cropped digits), in the authors' files of Matlab."""

import io
from collections.abc import Mapping

import numpy as np

from fastmeta.data.images import DataError, ImageDataset
from fastmeta.data.readers.optional import optional
from fastmeta.data.readers.original import Original, train_and_test

_PARTS = {"train_32x32.mat": "train", "test_32x32.mat": "test"}
_EXTRA = {"extra_32x32.mat": "unlabeled"}
_MD5 = {"train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373", "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3"}
_MD5_EXTRA = {"extra_32x32.mat": "a93ce644f1a588dc4d68dda5feec44a7"}
_URL = "http://ufldl.stanford.edu/housenumbers/"


def _read(name: str, parts: Mapping[str, str], content: Mapping[str, bytes]) -> ImageDataset:
    pieces = {file: _piece(file, content[file]) for file in parts}
    return train_and_test(name, tuple("0123456789"), pieces, parts)


def _piece(file: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    reader = optional("scipy.io", "scipy", "files of Matlab")
    try:
        held = reader.loadmat(io.BytesIO(content), variable_names=("X", "y"))
        pixels, labels = held["X"], held["y"][:, 0]
    except Exception as error:  # a damaged one raises anything
        raise DataError(f"{file}: must be a file of Matlab with X and y: {error}") from error
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[:3] != (32, 32, 3):
        raise DataError(f"{file}: X must be bytes [32, 32, 3, n], got {pixels.dtype} {list(pixels.shape)}")
    if labels.min() < 1:  # 10 is the digit 0
        raise DataError(f"{file}: y must lie in [1, 10], got {labels.min()}")
    return np.ascontiguousarray(pixels.transpose(3, 2, 0, 1)), np.where(labels == 10, 0, labels)


SVHN = Original("svhn", 10, tuple(_PARTS), _URL, lambda content: _read("svhn", _PARTS, content), md5=_MD5)
SVHN_EXTRA = Original(
    "svhn-extra",
    10,
    (*_EXTRA, *_PARTS),
    _URL,
    lambda content: _read("svhn-extra", {**_PARTS, **_EXTRA}, content),
    md5={**_MD5, **_MD5_EXTRA},
)
