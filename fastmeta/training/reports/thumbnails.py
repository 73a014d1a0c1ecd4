"""Small pictures of a run's images, as text that a page holds."""

import base64
import io
from collections.abc import Iterable, Mapping

import torch
from PIL import Image
from torch import Tensor

from fastmeta.data.images import Images, UnreadableImage

SIDE = 96  # pixels of the longer side; smaller images stay as they are


def places_of(images: Images, paths: Iterable[str]) -> dict[str, int]:
    """Where the images with these descriptions are; those that there are none of are left out."""
    wanted = set(paths)
    found: dict[str, int] = {}
    for place in range(len(images) if wanted else 0):
        path = images.describe(place)
        if path in wanted:
            found[path] = place
            if len(found) == len(wanted):
                break
    return found


def thumbnails(images: Images, places: Mapping[str, int]) -> dict[str, str]:
    """``data:`` addresses of pictures by description; images that cannot be read are left out."""
    pictures = {}
    for path, place in places.items():
        try:
            pixels = images.get(torch.tensor([place]))[0]
        except UnreadableImage:
            continue
        pictures[path] = address_of(pixels)
    return pictures


def address_of(pixels: Tensor) -> str:
    """An image ``[channels, height, width]``, uint8 or in [0, 1], as the address of a PNG or, if it is large, a JPEG.

    >>> address_of(torch.zeros(1, 8, 8))[:22]
    'data:image/png;base64,'
    """
    values = pixels if pixels.dtype == torch.uint8 else (255 * pixels.clamp(0, 1)).round().to(torch.uint8)
    values = values[:3] if len(values) >= 3 else values[:1]
    array = values.permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    is_small = max(picture.size) <= SIDE // 2
    picture.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    if is_small:
        picture.save(file, "PNG")
    else:
        picture.save(file, "JPEG", quality=80)
    kind = "png" if is_small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
