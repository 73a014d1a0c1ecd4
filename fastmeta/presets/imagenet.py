"""Sizes of ImageNet (ILSVRC 2012)."""

IMAGES = 1_281_167
CLASSES = 1_000


def per_class(share: float) -> int:
    """Labeled images of a class, of a share of all.

    >>> per_class(0.1), per_class(0.05)
    (128, 64)
    """
    return round(share * IMAGES / CLASSES)


def steps_of(epochs: float, images: int, batch: int) -> int:
    """Steps of that many passes.

    >>> steps_of(1, IMAGES, 256)
    5004
    """
    return int(epochs * images / batch)
