"""Images of foreign classes among the unlabeled ones: an open set, as photographs from anywhere are."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fastmeta.data.images import Images, fingerprint_of


class WithForeignClasses:
    """The images without the labels of their last classes: C is the number of those before them.

    Images of the foreign classes have target -1, so that a split takes them for unlabeled ones; there are none in an
    official validation or test part. Everything else is that of the images behind it.

    Args:
        images: these.
        count: how many classes are foreign.

    Raises:
        ValueError: fewer than two classes would be left.

    >>> from fastmeta.data import load_digits
    >>> open_set = WithForeignClasses(load_digits(), 4)
    >>> len(open_set.classes), int((open_set.targets < 0).sum())
    (6, 714)
    """

    def __init__(self, images: Images, count: int) -> None:
        known = len(images.classes) - count
        if count < 0 or known < 2:
            raise ValueError(
                f"foreign_classes must lie in [0, {len(images.classes) - 2}] for {images.name}, with two classes or "
                f"more left, got {count}"
            )
        foreign = images.targets >= known
        self.images, self.foreign_classes = images, count
        self.name: str = images.name
        self.classes: tuple[str, ...] = images.classes[:known]
        self.targets: Tensor = torch.where(foreign, -1, images.targets)
        self.parts: Mapping[str, Tensor] = {
            part: places[~foreign[places]] if part in ("validation", "test") else places
            for part, places in images.parts.items()
        }
        self.image_shape: tuple[int, ...] = images.image_shape
        self.fingerprint: str = fingerprint_of(images.fingerprint, "foreign", count)
        self.stamp: str = getattr(images, "stamp", images.fingerprint)

    def __len__(self) -> int:
        return len(self.targets)

    def get(self, places: Tensor) -> Tensor:
        """``[n, channels, height, width]``, as the images behind it give them."""
        return self.images.get(places)

    def describe(self, place: int) -> str:
        """As the images do."""
        return self.images.describe(place)


def with_foreign_classes(images: Images, count: int) -> Images:
    """The images themselves where no class is foreign, or where that is already so."""
    if not count or (isinstance(images, WithForeignClasses) and images.foreign_classes == count):
        return images
    return WithForeignClasses(images, count)
