"""Images that need no decoding, at another size or in other colours than they have."""

from dataclasses import dataclass

import torch
from PIL import Image

from fastmeta.data.images import Images
from fastmeta.data.readers.collection import Collection
from fastmeta.data.readers.names import Names
from fastmeta.data.readers.pictures import canvas_of


@dataclass(frozen=True)
class OpenArray:
    """Opens images as pictures of 8 bits."""

    images: Images

    def __call__(self, place: int) -> Image.Image:
        """The image at a place, of 8 bits."""
        pixels = self.images.get(torch.tensor([place]))[0]
        if pixels.is_floating_point():
            pixels = (255 * pixels).round_().byte()
        return Image.fromarray((pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)).contiguous().numpy())


def as_asked(images: Images, image_size: int | None, mode: str | None, stamp: str) -> Images | Collection:
    """The images themselves where they are as asked for; otherwise pictures that are resized and converted.

    >>> from fastmeta.data import load_digits
    >>> as_asked(load_digits(), None, "L", "").image_shape
    (1, 8, 8)
    """
    channels, *sides = images.image_shape
    size_fits = image_size is None or sides == [canvas_of(image_size)] * 2
    if size_fits and mode in (None, "L" if channels == 1 else "RGB"):
        return images
    names = Names(images.describe(place) for place in range(len(images)))
    targets, parts = images.targets, images.parts
    opener = OpenArray(images)
    return Collection(images.name, images.classes, targets, parts, names, opener, images.fingerprint, stamp)
