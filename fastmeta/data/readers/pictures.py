"""One picture file to a square of pixels, and the sizes and colours that suit many.

Pillow decodes. What it reads has many forms, and each becomes 8 bits of gray or RGB: palettes and CMYK are converted,
16 bits are scaled (0..65535 to 0..255), transparent parts show white, the first of several frames counts, and EXIF's
orientation is applied. The shorter side is resized to the square and the centre is kept.
"""

from collections import Counter
from collections.abc import Iterable
from statistics import median

import numpy as np
from PIL import Image

_JPEG = (".jpg", ".jpeg", ".jpe", ".jfif")
_OTHERS = (".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".tga")
SUFFIXES = frozenset(_JPEG + _OTHERS)
SMALL = 96  # pixels: up to here a canvas has the image's size; above, room for crops: 8/7 of it
LARGEST = 224  # what is taken at most where no size is asked for

_GRAY = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N", "F"})
_ORIENTATION = 0x0112  # EXIF's tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def canvas_of(image_size: int) -> int:
    """Side of the square that is stored for images trained on at ``image_size``.

    >>> canvas_of(32), canvas_of(96), canvas_of(224)
    (32, 96, 256)
    """
    return image_size if image_size <= SMALL else round(image_size * 8 / 7)


def suitable_size(sizes: Iterable[tuple[int, int]]) -> int:
    """The image size that suits pictures of these widths and heights: all are one square, or their median shorter side.

    Above 96 pixels a multiple of 32, at most 224, whose square is no larger than that median.

    >>> suitable_size([(28, 28)] * 9), suitable_size([(40, 50), (45, 41)]), suitable_size([(500, 375)])
    (28, 40, 224)
    """
    counted = Counter(sizes)
    width, height = next(iter(counted))
    if len(counted) == 1 and width == height <= SMALL:
        return width
    side = median(min(size) for size in counted.elements())
    if side <= SMALL:
        return max(8, 8 * round(side / 8))
    return int(min(LARGEST, max(SMALL, side * 7 // 8 // 32 * 32)))


def suitable_mode(modes: Iterable[str]) -> str:
    """``L`` (gray) where all pictures of these Pillow modes are gray, else ``RGB``.

    >>> suitable_mode(["L", "I;16"]), suitable_mode(["L", "P"])
    ('L', 'RGB')
    """
    return "L" if all(mode in _GRAY for mode in modes) else "RGB"


def to_canvas(picture: Image.Image, mode: str, canvas: int) -> np.ndarray:
    """``[channels, canvas, canvas]``, uint8: the centre of the picture as ``mode`` says, ``L`` or ``RGB``.

    Raises:
        Exception: whatever Pillow raises for what it cannot read.

    >>> to_canvas(Image.new("RGBA", (40, 30)), "RGB", 8).shape
    (3, 8, 8)
    """
    picture.draft(mode, (2 * canvas, 2 * canvas))  # JPEG: large ones are decoded at a half, quarter or eighth
    turn = _UPRIGHT.get(_orientation(picture))
    picture = as_mode(picture, mode)
    width, height = picture.size
    side = min(width, height)
    if (width, height) != (canvas, canvas):
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
        picture = picture.resize((canvas, canvas), Image.Resampling.BILINEAR, box=box)
    if turn is not None:
        picture = picture.transpose(turn)  # of a centred square: the same before and after
    pixels = np.asarray(picture)
    return pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)


def _orientation(picture: Image.Image) -> int:
    try:
        return picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # a broken note beside pixels that may be whole
        return 1


def as_mode(picture: Image.Image, mode: str) -> Image.Image:
    """The whole picture in 8 bits, ``L`` or ``RGB``.

    Raises:
        Exception: whatever Pillow raises for what it cannot read.
    """
    sixteen = picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM"))
    if sixteen:
        pixels = np.asarray(picture).astype(np.uint32)
        picture = Image.fromarray(((pixels + 128) // 257).astype(np.uint8))
    elif picture.mode in ("I", "F"):
        raise ValueError("32 bits a pixel have no known range: store 8 or 16 bits")
    elif picture.has_transparency_data:
        shown = Image.new("RGBA", picture.size, "white")
        shown.alpha_composite(picture.convert("RGBA"))
        picture = shown
    picture.load()
    return picture if picture.mode == mode else picture.convert(mode)
