"""CIFAR-10 and CIFAR-100 in Krizhevsky's files, those of the python and of the binary version."""

import pickle
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fastmeta.data.images import DataError, ImageDataset
from fastmeta.data.readers.original import Original, train_and_test
from fastmeta.data.readers.plain_pickle import read_pickle

_URL = "https://www.cs.toronto.edu/~kriz/"
_SHAPE = (3, 32, 32)
_BYTES = 3072
_PARTS_10 = {**{f"data_batch_{number}": "train" for number in range(1, 6)}, "test_batch": "test"}
_PARTS_100 = {"train": "train", "test": "test"}
_Reader = Callable[[Mapping[str, bytes]], ImageDataset]


def _of_pickles(name: str, parts: Mapping[str, str], meta: str, labels: str, names: str) -> _Reader:
    """``labels`` is the key of the labels in a batch, ``names`` that of the classes' names in the file ``meta``."""

    def read(content: Mapping[str, bytes]) -> ImageDataset:
        classes = tuple(text.decode() for text in _unpickled(meta, content[meta], names)[0])
        pieces = {}
        for file in parts:
            pixels, numbers = _unpickled(file, content[file], "data", labels)
            if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (_BYTES,):
                raise DataError(f"{file}: data must be bytes [n, {_BYTES}], got {getattr(pixels, 'shape', pixels)}")
            pieces[file] = (pixels.reshape(-1, *_SHAPE), np.asarray(numbers))
        return train_and_test(name, classes, pieces, parts)

    return read


def _unpickled(file: str, content: bytes, *keys: str) -> list[Any]:
    try:
        held = read_pickle(content)
    except pickle.UnpicklingError as error:
        raise DataError(f"{file}: must be a pickle of arrays: {error}") from error
    if not isinstance(held, dict) or not {key.encode() for key in keys} <= held.keys():
        raise DataError(f"{file}: must be a pickled dict with {', '.join(keys)}, got {str(held)[:80]}")
    return [held[key.encode()] for key in keys]


def _of_records(name: str, parts: Mapping[str, str], names: str, label_bytes: int) -> _Reader:
    """An image is the bytes of its labels, the last of which counts, and 3,072 of pixels; ``names`` is a file."""

    def read(content: Mapping[str, bytes]) -> ImageDataset:
        pieces = {}
        for file in parts:
            values = np.frombuffer(content[file], np.uint8)
            if len(values) % (label_bytes + _BYTES):
                raise DataError(f"{file}: must be records of {label_bytes + _BYTES} bytes, got {len(values)} bytes")
            rows = values.reshape(-1, label_bytes + _BYTES)
            pieces[file] = (rows[:, label_bytes:].reshape(-1, *_SHAPE), rows[:, label_bytes - 1])
        return train_and_test(name, tuple(content[names].decode().split()), pieces, parts)

    return read


def _binary(parts: Mapping[str, str]) -> dict[str, str]:
    return {f"{file}.bin": part for file, part in parts.items()}


CIFAR = (
    Original(
        "cifar-10",
        10,
        (*_PARTS_10, "batches.meta"),
        f"{_URL}cifar-10-python.tar.gz",
        _of_pickles("cifar-10", _PARTS_10, "batches.meta", "labels", "label_names"),
        folders=("cifar-10-batches-py",),
        archives=("cifar-10-python.tar.gz",),
        md5={"cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a"},
    ),
    Original(
        "cifar-10",
        10,
        (*_binary(_PARTS_10), "batches.meta.txt"),
        f"{_URL}cifar-10-binary.tar.gz",
        _of_records("cifar-10", _binary(_PARTS_10), "batches.meta.txt", 1),
        folders=("cifar-10-batches-bin",),
        archives=("cifar-10-binary.tar.gz",),
    ),
    Original(
        "cifar-100",
        100,
        (*_PARTS_100, "meta"),
        f"{_URL}cifar-100-python.tar.gz",
        _of_pickles("cifar-100", _PARTS_100, "meta", "fine_labels", "fine_label_names"),
        folders=("cifar-100-python",),
        archives=("cifar-100-python.tar.gz",),
        md5={"cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85"},
    ),
    Original(
        "cifar-100",
        100,
        (*_binary(_PARTS_100), "fine_label_names.txt"),
        f"{_URL}cifar-100-binary.tar.gz",
        _of_records("cifar-100", _binary(_PARTS_100), "fine_label_names.txt", 2),
        folders=("cifar-100-binary",),
        archives=("cifar-100-binary.tar.gz",),
    ),
)
