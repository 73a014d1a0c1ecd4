"""Splits images into the parts a semi-supervised experiment may look at for different purposes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fastmeta.data.foreign import WithForeignClasses
from fastmeta.data.images import DataError, Images, fingerprint_of
from fastmeta.data.landmarks import Landmarks
from fastmeta.data.seeding import generator_for

# The test images are the same for every seed, so that no choice made on one seed's validation images has seen
# another seed's test images.
_TEST_SEED = 20260101


@dataclass(frozen=True)
class Split:
    """Disjoint places of images, each ``[.]`` int64: all of them, but for what an imbalance leaves out.

    Args:
        labeled: the labels the training loss uses.
        unlabeled: images whose labels training never reads.
        holdout: labels that only a method's outer objective may use (example weights do; the others leave them).
        validation: labels for choices: hyper-parameters, and which weights of a run are reported.
        test: labels for the reported error, read for nothing else.
    """

    labeled: Tensor
    unlabeled: Tensor
    holdout: Tensor
    validation: Tensor
    test: Tensor

    def sizes(self) -> dict[str, int]:
        """Number of images in each part."""
        return {field.name: len(getattr(self, field.name)) for field in fields(self)}


def make_split(
    images: Images,
    *,
    labels_per_class: int | None,
    seed: int,
    holdout_per_class: int = 0,
    validation_per_class: int = 0,
    validation: int = 0,
    test_fraction: float = 0.0,
    imbalance: float = 1.0,
    unlabeled_imbalance: float = 1.0,
    holdout: int = 0,
) -> Split:
    """Split the "train" part of ``images`` class by class; ``seed`` moves all that is drawn but test images.

    Official parts stay whole: "validation" and "test" are the split's own, and nothing is drawn for them from "train"
    then; "unlabeled" comes after what "train" leaves. Labeled images are a prefix of one random order per class: the
    images labeled at ``labels_per_class=1`` are among those labeled at 4.

    Class ``k`` of C has ``labels_per_class * imbalance ** (-k / (C - 1))`` labels, one at least, and its unlabeled
    images are to those of the first class as ``unlabeled_imbalance ** (-k / (C - 1))``, as many as there are images
    for; the others are left out (Kim et al., 2020, DARP, for CIFAR-10-LT).

    Args:
        images: with its official parts. Landmarks are split as images of one class.
        labels_per_class: labeled images of a class; None: every label of "train" that no other part takes.
        seed: of the draw.
        holdout_per_class: labeled images of a class for ``holdout``.
        validation_per_class: labeled images of a class for ``validation``.
        validation: labeled images in all for ``validation``, without regard to their classes.
        test_fraction: share of a class for ``test``.
        imbalance: labels of the first class over those of the last, geometric in between.
        unlabeled_imbalance: the same of the unlabeled images of "train".
        holdout: labeled images in all for ``holdout``, without regard to their classes.

    Raises:
        DataError: a class has too few labels, or there is one class only.
        ValueError: a size is out of range, or is asked for although there is an official part.

    >>> from fastmeta.data import load_digits
    >>> split = make_split(load_digits(), labels_per_class=1, seed=0, validation_per_class=20, test_fraction=0.25)
    >>> split.sizes()
    {'labeled': 10, 'unlabeled': 1137, 'holdout': 0, 'validation': 200, 'test': 450}
    """
    if labels_per_class is not None and labels_per_class < 1:
        raise ValueError(f"labels_per_class must be at least 1, got {labels_per_class}")
    for name, size in (
        ("holdout_per_class", holdout_per_class),
        ("validation_per_class", validation_per_class),
        ("validation", validation),
        ("holdout", holdout),
    ):
        if size < 0:
            raise ValueError(f"{name} must be at least 0, got {size}")
    if not 0 <= test_fraction < 1:
        raise ValueError(f"test_fraction must lie in [0, 1), got {test_fraction}")
    if validation and validation_per_class:
        raise ValueError(f"validation must be 0 with validation_per_class {validation_per_class}, got {validation}")
    if holdout and holdout_per_class:
        raise ValueError(f"holdout must be 0 with holdout_per_class {holdout_per_class}, got {holdout}")
    for name, drawn, part in (
        ("validation_per_class", validation_per_class, "validation"),
        ("validation", validation, "validation"),
        ("test_fraction", test_fraction, "test"),
    ):
        if drawn and part in images.parts:
            raise ValueError(f"{name} must be 0, because {images.name} has an official {part} part, got {drawn}")
    classes, targets = images.classes, images.targets
    if isinstance(images, Landmarks):  # without classes: all images are of one kind
        classes, targets = ("landmarks",), torch.zeros(len(images), dtype=torch.int64)
    elif len(images.classes) < 2:
        raise DataError(
            f"{images.name}: expected two classes or more, got {' '.join(images.classes) or 'none'}; if that is a "
            "folder of class folders, give its path"
        )
    train = images.parts["train"]
    train_targets = targets[train]
    if isinstance(images, WithForeignClasses):
        targets = images.images.targets  # foreign images all stay
    if unlabeled_imbalance != 1 and ("unlabeled" in images.parts or bool((targets[train] < 0).any())):
        raise ValueError(
            f"unlabeled_imbalance must be 1, because {images.name} has unlabeled images of its own, got "
            f"{unlabeled_imbalance}"
        )
    if imbalance != 1 and labels_per_class is None:
        raise ValueError(f"imbalance must be 1 without labels_per_class, got {imbalance}")
    shares = _shares("imbalance", imbalance, len(classes))
    unlabeled_shares = _shares("unlabeled_imbalance", unlabeled_imbalance, len(classes))

    parts: dict[str, list[Tensor]] = {field.name: [train[:0]] for field in fields(Split)}
    left, num_tests = [], []
    for label, class_name in enumerate(classes):
        members = train[train_targets == label]
        if not len(members):
            raise DataError(f"{images.name}: class {class_name} has no labeled training image, expected one or more")
        members = members[torch.randperm(len(members), generator=generator_for(_TEST_SEED, "test", label))]
        num_tests.append(round(test_fraction * len(members)))
        parts["test"].append(members[: num_tests[-1]])
        left.append(members[num_tests[-1] :])
    drawn_in_all = {name: count for name, count in (("validation", validation), ("holdout", holdout)) if count}
    for name, count in drawn_in_all.items():
        parts[name].append(_drawn(torch.cat(left), name, count, seed))
        left = [members[~torch.isin(members, parts[name][-1])] for members in left]
    unlabeled = []
    for label, (class_name, members) in enumerate(zip(classes, left, strict=True)):
        validation_end = holdout_per_class + validation_per_class
        labels = None if labels_per_class is None else max(1, round(labels_per_class * shares[label]))
        labeled_end = len(members) if labels is None else validation_end + labels
        if labeled_end > len(members) or labeled_end <= validation_end:
            outside = ["the test set"] * bool(num_tests[label]) + [f"the {name} images" for name in drawn_in_all]
            raise DataError(_too_few(class_name, len(members), labels_per_class, validation_end, outside))
        members = members[torch.randperm(len(members), generator=generator_for(seed, "split", label))]
        parts["holdout"].append(members[:holdout_per_class])
        parts["validation"].append(members[holdout_per_class:validation_end])
        parts["labeled"].append(members[validation_end:labeled_end])
        unlabeled.append(members[labeled_end:])
    if unlabeled_imbalance != 1:
        largest = min(len(members) / share for members, share in zip(unlabeled, unlabeled_shares, strict=True))
        unlabeled = [
            members[: round(largest * share)] for members, share in zip(unlabeled, unlabeled_shares, strict=True)
        ]
    parts["unlabeled"] += [*unlabeled, train[train_targets < 0]]
    for name in ("unlabeled", "validation", "test"):
        if name in images.parts:
            parts[name].append(images.parts[name])
    return Split(**{name: torch.cat(pieces) for name, pieces in parts.items()})


def _shares(name: str, imbalance: float, classes: int) -> list[float]:
    """Of each class, relative to the first."""
    if not 1 <= imbalance < math.inf:
        raise ValueError(f"{name} must be at least 1 and finite, got {imbalance}")
    return [imbalance ** (-label / max(1, classes - 1)) for label in range(classes)]


def _drawn(places: Tensor, name: str, count: int, seed: int) -> Tensor:
    if count >= len(places):
        raise DataError(f"{name} must be below {len(places)}, the labeled images there are, got {count}")
    return places[torch.randperm(len(places), generator=generator_for(seed, name))[:count]]


def _too_few(class_name: str, available: int, labels: int | None, taken: int, outside: Sequence[str]) -> str:
    has = f"class {class_name} has {available} labeled images"
    has += f" outside of {' and '.join(outside)}" if outside else ""
    others = f"{taken} are for hold-out and validation"
    if labels is None:
        return f"{has} and {others}: expected {taken + 1} or more"
    because = f"{has} and {others}" if taken else has
    return f"labels_per_class must be at most {max(available - taken, 0)}, because {because}, got {labels}"


def record(images: Images, split: Split) -> dict[str, Any]:
    """What a run writes down about its data, to know them again.

    >>> from fastmeta.data import load_digits
    >>> digits = load_digits()
    >>> record(digits, make_split(digits, labels_per_class=1, seed=0))["sizes"]
    {'labeled': 10, 'unlabeled': 1787, 'holdout': 0, 'validation': 0, 'test': 0}
    """
    return {
        "name": images.name,
        "fingerprint": images.fingerprint,
        "classes": list(images.classes),
        "image_shape": list(images.image_shape),
        "sizes": split.sizes(),
        "places": fingerprint_of(*(getattr(split, field.name) for field in fields(split))),
    }
