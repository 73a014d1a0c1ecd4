"""Published data sets by name, whether in their original files or as the hub has them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fastmeta.data.images import DataError, Images
from fastmeta.data.readers.cifar import CIFAR
from fastmeta.data.readers.collection import Collection
from fastmeta.data.readers.idx import FASHION_MNIST, MNIST
from fastmeta.data.readers.optional import MissingPackage
from fastmeta.data.readers.original import Original
from fastmeta.data.readers.svhn import SVHN, SVHN_EXTRA
from fastmeta.data.readers.tiny_imagenet import TINY_IMAGENET

_ORIGINALS = (*CIFAR, SVHN_EXTRA, SVHN, FASHION_MNIST, MNIST, TINY_IMAGENET)
PICTURES = {"imagenet": 224, "imagenet-72": 72}
"""Data sets without a form of their own, folders of pictures or parquet, and the image size of each.

ImageNet-72 is that of Rebuffi et al. (2017), whose shorter side is 72; any other size is resized to it, and the centre
square is kept.
"""
PUBLISHED = (*dict.fromkeys(original.name for original in _ORIGINALS), *PICTURES, "aflw", "imdb")


def named(path: str) -> tuple[str | None, str]:
    """The name of a published data set and the path behind it; None where there is no such name.

    >>> named("cifar-10:~/data"), named("huggingface:cifar10")
    (('cifar-10', '~/data'), (None, 'huggingface:cifar10'))
    """
    name, colon, rest = path.partition(":")
    return (name, rest) if colon and name in PUBLISHED else (None, path)


def how_to_get(name: str) -> str:
    """The files of a published data set, and where they are from.

    >>> how_to_get("imagenet")
    'expected train/<class>/*.JPEG and val/<class>/*.JPEG'
    """
    originals = [original for original in _ORIGINALS if original.name == name]
    return originals[0].how_to_get() if originals else "expected train/<class>/*.JPEG and val/<class>/*.JPEG"


def open_original(path: Path, *, cache: bool) -> Images | Collection | None:
    """A data set in its original files, known by their names; None where there is none.

    Raises:
        DataError: it may be one of several, or a file is missing or damaged.
    """
    found: dict[str, tuple[Original, Path]] = {}
    for original in _ORIGINALS:
        place = original.place(path)
        if place is not None:
            found.setdefault(original.name, (original, place))
    if SVHN_EXTRA.name in found:
        found.pop(SVHN.name, None)
    if len(found) > 1:
        choice = " or ".join(f"{name}:{path}" for name in found)
        raise DataError(f"{path}: may be {' or '.join(found)}, give {choice}")
    return next((original.open(place, cache=cache) for original, place in found.values()), None)


def open_named(
    name: str, path: Path, other: Callable[[Path], Images | Collection], *, cache: bool
) -> Images | Collection:
    """The data set ``name``: in its original files, or as ``other`` finds it, with the parts that papers have.

    Raises:
        DataError: it is not there, or has another number of classes or no part that it must have.
    """
    originals = [original for original in _ORIGINALS if original.name == name]
    for original in originals:
        place = original.place(path)
        if place is not None:
            return original.open(place, cache=cache)
    try:
        found = other(path)
    except MissingPackage:
        raise
    except DataError as error:
        if not originals:
            raise
        raise DataError(f"{_missing(path, originals[0])} ({error})") from error
    parts = dict(found.parts)
    if name == "svhn":
        parts.pop("unlabeled", None)
    if name == "tiny-imagenet" and "test" not in parts and "validation" in parts:
        parts["test"] = parts.pop("validation")
    if not originals and not {"validation", "test"} & parts.keys():
        raise DataError(f"{path}: {name} needs val/<class>/ or a validation part beside train, got {', '.join(parts)}")
    needed = {"test", "unlabeled"} if name == "svhn-extra" else {"test"}
    if originals and not needed <= parts.keys():
        raise DataError(f"{_missing(path, originals[0])} (got the parts {', '.join(parts)})")
    if originals and len(found.classes) != originals[0].classes:
        raise DataError(f"{path}: {name} has {originals[0].classes} classes, got {len(found.classes)}")
    return replace(found, name=name, parts=parts) if isinstance(found, Collection) else found


def _missing(path: Path, original: Original) -> str:
    return f"{path}: no {original.name} found; {original.how_to_get()}; or parquet files as the hub has them"
