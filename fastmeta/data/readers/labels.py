"""From what readers find to numbers: parts by their usual names, classes, and which labels are none."""

import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fastmeta.data.images import PARTS, DataError
from fastmeta.data.readers.names import printable

PART_NAMES = {
    **{part: part for part in PARTS},
    **dict.fromkeys(("unlabelled", "unsupervised"), "unlabeled"),
    **dict.fromkeys(("val", "valid"), "validation"),
    "training": "train",
    "testing": "test",
}
_SHOWN = 5


def shown(names: Sequence[str]) -> str:
    """The first few names, and how many more there are.

    >>> shown(list("abcdefg"))
    'a, b, c, d, e and 2 more'
    """
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def part_of(file_name: str) -> str | None:
    """The part that a file's or folder's name begins with.

    >>> part_of("train-00000-of-00002.parquet"), part_of("Val"), part_of("cats.parquet")
    ('train', 'validation', None)
    """
    word = ""
    for letter in file_name.lower():
        if not letter.isalpha():
            break
        word += letter
    return PART_NAMES.get(word)


def class_name(label: str) -> str:
    r"""A class's name as it is compared: no blanks around it, one form of each accent (a Mac's zip files have another).

    >>> class_name(" cafe\u0301 ") == "caf\u00e9"
    True
    """
    return unicodedata.normalize("NFC", printable(label.strip()))


def number_labels(
    labels: Sequence[str], parts: Mapping[str, Tensor], describe: Callable[[int], str]
) -> tuple[tuple[str, ...], Tensor]:
    """Classes, those of the labels of "train", and the targets ``[M]``; an empty label is none: -1.

    Classes are in alphabetical order, or by value where all are whole numbers.

    Raises:
        DataError: another part has a label that "train" has not, or "train" has none.
    """
    found = {labels[place] for place in parts["train"].tolist()} - {""} if "train" in parts else set()
    if not found:
        raise DataError(f"{describe(0)}: nothing in the train part has a label, expected some for every class")
    whole = all(label.removeprefix("-").isdecimal() for label in found)
    classes = tuple(sorted(found, key=int if whole else None))
    number = {"": -1} | {label: place for place, label in enumerate(classes)}
    for place, label in enumerate(labels):
        if label not in number:
            raise DataError(
                f"{describe(place)}: label {label!r} is no class of the train part, expected one of {shown(classes)}"
            )
    return classes, torch.tensor([number[label] for label in labels], dtype=torch.int64)


def checked_parts(
    name: str, classes: Sequence[str], targets: Tensor, parts: Mapping[str, Tensor], describe: Callable[[int], str]
) -> dict[str, Tensor]:
    """The parts that are not empty, without a validation or test part that nobody labelled (a warning says so).

    Raises:
        DataError: there is no image for training, a target is no class, or a validation or test image has no label.
    """
    kept = {part: places for part, places in parts.items() if len(places)}
    if "train" not in kept:
        raise DataError(f"{name}: no images found for training, got {_sizes(parts)}")
    if len(targets) and not -1 <= int(targets.min()) <= int(targets.max()) < len(classes):
        place = int(targets.argmax() if int(targets.min()) >= -1 else targets.argmin())
        expected = f"0 to {len(classes) - 1}, or -1 for none"
        raise DataError(f"{describe(place)}: label {int(targets[place])} is no class, expected {expected}")
    for part in ("validation", "test"):
        if part not in kept:
            continue
        without = kept[part][targets[kept[part]] < 0]
        if len(without) == len(kept[part]):
            warnings.warn(f"{name}: the {part} part has no labels and is left out", stacklevel=2)
            del kept[part]
        elif len(without):
            raise DataError(
                f"{describe(int(without[0]))}: a {part} image has no label ({len(without)} of {len(kept[part])} have "
                "none), expected a class"
            )
    return kept


def _sizes(parts: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{part}: {len(places)}" for part, places in parts.items()) or "none"
