"""Splits a dataset into the parts a semi-supervised experiment may look at for different purposes."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fastmeta.data.dataset import ImageDataset
from fastmeta.data.seeding import generator_for

# The test images are the same for every seed, so that no choice made on one seed's validation images has seen
# another seed's test images.
_TEST_SEED = 20260101


@dataclass(frozen=True)
class Split:
    """Disjoint indices into a dataset, each ``[.]`` int64, together the whole of it.

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
    dataset: ImageDataset,
    labels_per_class: int,
    seed: int,
    *,
    holdout_per_class: int = 3,
    validation_per_class: int = 20,
    test_fraction: float = 0.25,
) -> Split:
    """Split ``dataset`` class by class; ``seed`` moves every part but the test set.

    The unlabeled part is what is left. Labeled images are a prefix of one random order per class: the images labeled
    at ``labels_per_class=1`` are among those labeled at 4.

    Raises:
        ValueError: a class has too few images, or a size is out of range.

    >>> from fastmeta.data import load_digits
    >>> make_split(load_digits(), labels_per_class=1, seed=0).sizes()
    {'labeled': 10, 'unlabeled': 1107, 'holdout': 30, 'validation': 200, 'test': 450}
    """
    if labels_per_class < 1:
        raise ValueError(f"labels_per_class must be at least 1, got {labels_per_class}")
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction must lie between 0 and 1, got {test_fraction}")
    parts: dict[str, list[Tensor]] = {field.name: [] for field in fields(Split)}
    for label in range(dataset.num_classes):
        members = (dataset.targets == label).nonzero().squeeze(1).cpu()
        members = members[torch.randperm(len(members), generator=generator_for(_TEST_SEED, "test", label))]
        num_test = round(test_fraction * len(members))
        parts["test"].append(members[:num_test])
        members = members[num_test:]
        needed = labels_per_class + holdout_per_class + validation_per_class + 1
        if len(members) < needed:
            rest = needed - labels_per_class
            raise ValueError(
                f"labels_per_class must be at most {len(members) - rest}, because class {label} has {len(members)} "
                f"images outside of the test set and {rest} are for the other parts, got {labels_per_class}"
            )
        members = members[torch.randperm(len(members), generator=generator_for(seed, "split", label))]
        holdout_end = holdout_per_class
        validation_end = holdout_end + validation_per_class
        labeled_end = validation_end + labels_per_class
        parts["holdout"].append(members[:holdout_end])
        parts["validation"].append(members[holdout_end:validation_end])
        parts["labeled"].append(members[validation_end:labeled_end])
        parts["unlabeled"].append(members[labeled_end:])
    return Split(**{name: torch.cat(pieces) for name, pieces in parts.items()})
