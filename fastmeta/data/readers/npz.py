"""Arrays of images in an npz file."""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastmeta.data.images import DataError, ImageDataset
from fastmeta.data.readers.labels import checked_parts, class_name, number_labels
from fastmeta.data.readers.shards import RowNames, places_of_parts

# Ours; MedMNIST's, the same with train_ and val_; Keras's, x_train and y_train.
_NAMES = {
    "train": (("images", "train_images", "x_train"), ("labels", "train_labels", "y_train")),
    "unlabeled": (("unlabeled_images", "x_unlabeled"), ("unlabeled_labels", "y_unlabeled")),
    "validation": (("validation_images", "val_images", "x_val"), ("validation_labels", "val_labels", "y_val")),
    "test": (("test_images", "x_test"), ("test_labels", "y_test")),
}


def open_npz(path: Path) -> ImageDataset:
    """Images of an npz, in memory: ``images`` and ``labels``, and the like for other parts.

    ``images``: ``[N, height, width]``, or with 1 or 3 channels in second or last place; uint8, other whole numbers from
    0 to 255, or floating point in [0, 1]. ``labels``: ``[N]`` or ``[N, 1]``, whole numbers (-1: none) or names (empty:
    none). ``unlabeled_images`` need no labels; ``validation_images``, ``validation_labels``, ``test_images`` and
    ``test_labels`` are official parts; ``classes`` names the numbers.

    Raises:
        DataError: arrays are missing, hold Python objects (they are not loaded), or do not fit.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: _array(path, file, name) for name in file.files}
    except (zipfile.BadZipFile, ValueError, OSError, EOFError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: must be an npz file: {error}") from None
    images: list[Tensor] = []
    labels: list[np.ndarray] = []
    keys: list[str] = []
    for part, (image_keys, label_keys) in _NAMES.items():
        key = next((key for key in image_keys if key in arrays), None)
        if key is None:
            continue
        images.append(_images(f"{path}: {key}", arrays[key]))
        labels.append(_labels(path, key, len(images[-1]), _first(arrays, label_keys), part))
        keys.append(key)
    if not keys or keys[0] not in _NAMES["train"][0]:
        raise DataError(f"{path}: must hold the arrays images and labels, got {', '.join(arrays) or 'none'}")
    for key, more in zip(keys, images, strict=True):
        if more.shape[1:] != images[0].shape[1:] or more.dtype != images[0].dtype:
            raise DataError(
                f"{path}: {key} must be as {keys[0]}, {images[0].dtype} {list(images[0].shape[1:])}, got {more.dtype} "
                f"{list(more.shape[1:])}"
            )
    counts = [len(more) for more in images]
    found = places_of_parts([part for part, (names, _) in _NAMES.items() if set(names) & set(keys)], counts)
    names = RowNames([path.name if key == "images" else f"{path.name}:{key}" for key in keys], counts)
    classes, targets = _classes(path, arrays.get("classes"), labels, found, names)
    parts = checked_parts(path.name, classes, targets, found, names.__getitem__)
    return ImageDataset(path.name, torch.cat(images), targets, classes, parts, names)


def _array(path: Path, file: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    try:
        return file[name]
    except ValueError:
        raise DataError(f"{path}: {name} holds Python objects, which are not loaded, expected numbers") from None


def _first(arrays: Mapping[str, np.ndarray], keys: tuple[str, ...]) -> np.ndarray | None:
    return next((arrays[key] for key in keys if key in arrays), None)


def _images(what: str, array: np.ndarray) -> Tensor:
    """``[N, channels, height, width]``, uint8 or float32."""
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[3] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    if array.ndim != 4 or array.shape[1] not in (1, 3) or not array.size:
        raise DataError(f"{what} must be images [N, height, width], with 1 or 3 channels or none, got {array.shape}")
    low, high = array.min(), array.max()
    if array.dtype.kind == "f" and 0 <= low <= high <= 1:
        return torch.from_numpy(np.ascontiguousarray(array, np.float32))
    if array.dtype.kind in "iu" and 0 <= low <= high <= 255:
        return torch.from_numpy(np.ascontiguousarray(array, np.uint8))
    raise DataError(f"{what} must be whole numbers from 0 to 255 or in [0, 1], got {array.dtype} from {low} to {high}")


def _labels(path: Path, key: str, count: int, labels: np.ndarray | None, part: str) -> np.ndarray:
    if labels is None:
        if part == "train":
            raise DataError(f"{path}: must hold labels for {key}, got none")
        return np.full(count, -1)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != (count,) or labels.dtype.kind not in "iuU":
        raise DataError(
            f"{path}: the labels of {key} must be {count} whole numbers or names, got {labels.dtype} {labels.shape}"
        )
    return labels


def _classes(
    path: Path, classes: np.ndarray | None, labels: list[np.ndarray], parts: Mapping[str, Tensor], names: RowNames
) -> tuple[tuple[str, ...], Tensor]:
    texts = [class_name(str(label)) for part in labels for label in part.tolist()]
    texts = ["" if text == "-1" else text for text in texts]
    if classes is None:
        return number_labels(texts, parts, names.__getitem__)
    if classes.ndim != 1 or classes.dtype.kind != "U":
        raise DataError(f"{path}: classes must be names, got {classes.dtype} {classes.shape}")
    named = tuple(class_name(name) for name in classes.tolist())
    numbers = {str(place): place for place in range(len(named))} | {"": -1}
    # Whole numbers are places in classes, also where classes are called by other numbers ("1" to "9", "0").
    by_name = numbers | {name: place for place, name in enumerate(named)}
    are_names = [part.dtype.kind == "U" for part in labels for _ in part]
    targets = []
    for place, (text, is_name) in enumerate(zip(texts, are_names, strict=True)):
        number = by_name if is_name else numbers
        if text not in number:
            raise DataError(f"{names[place]}: label {text!r} is no class, expected one of {len(named)}")
        targets.append(number[text])
    return named, torch.tensor(targets, dtype=torch.int64)
