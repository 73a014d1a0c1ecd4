"""The operations of RandAugment and CTAugment: plain data. What they do is in ``reference.py``."""

from typing import NamedTuple

LARGEST_SIDE = 8192  # of an image: places of pixels are fixed-point numbers of 16 and 16 bits
GRAY = (127, 127, 127)  # of a cutout


class Operation(NamedTuple):
    """What an operation's level means, and its bounds: a level beyond them is taken for the nearest one."""

    low: float
    high: float
    level: str


_SHARE = Operation(0, 1, "share of the changed image in a blend with the image")
_FACTOR = Operation(0, 16, "0 is the image without any, 1 the image itself; more goes on beyond it")
_SLOPE = Operation(-1, 1, "pixel x shows what lay at x + level * y; of shear-y, y what lay at y + level * x")
_PIXELS = Operation(-LARGEST_SIDE, LARGEST_SIDE, "pixel x shows what lay at x + level; of translate-y, so for y")
_CUT = Operation(0, 0.25, "share of the side that is cut off at each end; what is left is enlarged")

# An operation's code is its place: the 14 of RandAugment, then what CTAugment has beside them, where the six filters of
# "rescale" are one operation. csrc/augment.h has them in the same order.
OPERATIONS: dict[str, Operation] = {
    "identity": Operation(0, 0, "nothing"),
    "autocontrast": _SHARE,
    "equalize": _SHARE,
    "rotate": Operation(-360, 360, "degrees, counterclockwise"),
    "solarize": Operation(0, 256, "values from here on are inverted"),
    "color": _FACTOR,
    "contrast": _FACTOR,
    "brightness": _FACTOR,
    "sharpness": _FACTOR,
    "shear-x": _SLOPE,
    "shear-y": _SLOPE,
    "translate-x": _PIXELS,
    "translate-y": _PIXELS,
    "posterize": Operation(1, 8, "bits that are kept, as a whole number"),
    "invert": _SHARE,
    "blur": _SHARE,
    "smooth": _SHARE,
    "cutout": Operation(0, 2 * LARGEST_SIDE, "side of a square in pixels; what has its centre inside is covered"),
    "rescale-lanczos": _CUT,
    "rescale-bicubic": _CUT,
    "rescale-bilinear": _CUT,
    "rescale-box": _CUT,
    "rescale-hamming": _CUT,
    "rescale-nearest": _CUT,
}
CODES = {name: code for code, name in enumerate(OPERATIONS)}
