"""RandAugment as FixMatch and its successors use it: three things of one name, each as it was published."""

import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastmeta.data.augment.apply import view
from fastmeta.data.augment.augmentation import Augmentation
from fastmeta.data.augment.operations import CODES, GRAY
from fastmeta.data.augment.pixels import centre
from fastmeta.data.augment.weak import started
from fastmeta.data.random_numbers import KeyedRandom

PresetName = Literal["google", "paper", "usb"]
_PUBLISHED_SIDE = 32


class Strength(NamedTuple):
    """An operation's level, at a magnitude m in [0, 1]: ``first + m span``, of one sign or either.

    ``whole``: ``m span`` without what follows the point. ``of_side``: it is a share of the image's side.
    """

    first: float = 0.0
    span: float = 0.0
    signed: bool = False
    whole: bool = False
    of_side: bool = False


@dataclass(frozen=True)
class Preset:
    """How operations are drawn.

    Args:
        strengths: of each operation, of which all are as probable.
        per_image: how many an image draws, with replacement.
        probability: that a drawn one is applied.
        magnitudes: m is one of 1, ..., magnitudes - 1 over magnitudes; None: uniform in [0, 1).
        cutout: side of the gray square, least and greatest share of the image's, between which it is uniform.
        cutout_at_corners: the square's middle is a corner of pixels, else it may lie anywhere.
        fill: what a geometric operation moves in.
        square: color of the cutout.
    """

    strengths: dict[str, Strength]
    per_image: int
    probability: float
    magnitudes: int | None
    cutout: tuple[float, float]
    cutout_at_corners: bool = False
    fill: int = 0
    square: tuple[int, int, int] = GRAY


_WHOLLY = Strength(1.0)  # a share that is no range
_PAPER_FACTOR = Strength(0.05, 0.9)

# FixMatch's code (google-research/fixmatch: third_party/auto_augment/augmentations.py, RANDOM_POLICY_OPS of
# libml/augment.py). What moves in is gray there, unless a table operation follows, for which it is black; here it is
# gray. Translations are 1 to 9 pixels of its 32.
_GOOGLE = Preset(
    strengths={
        "identity": Strength(),
        "autocontrast": _WHOLLY,
        "equalize": _WHOLLY,
        "rotate": Strength(0, 30, signed=True, whole=True),
        "solarize": Strength(256, -256, whole=True),
        "color": Strength(0.1, 1.8),
        "contrast": Strength(0.1, 1.8),
        "brightness": Strength(0.1, 1.8),
        "sharpness": Strength(0.1, 1.8),
        "shear-x": Strength(0, 0.3, signed=True),
        "shear-y": Strength(0, 0.3, signed=True),
        "translate-x": Strength(0, 10 / _PUBLISHED_SIDE, signed=True, whole=True, of_side=True),
        "translate-y": Strength(0, 10 / _PUBLISHED_SIDE, signed=True, whole=True, of_side=True),
        "posterize": Strength(4, -4, whole=True),
    },
    per_image=2,
    probability=0.5,
    magnitudes=10,
    cutout=(0.5, 0.5),
    cutout_at_corners=True,
    fill=127,
)

# The ranges of FixMatch's appendix, drawn as above: the widespread port to PyTorch (kekmodel/FixMatch-pytorch:
# dataset/randaugment.py), whose square is a pixel larger and not cut at the left and the upper border.
_PAPER = Preset(
    strengths=_GOOGLE.strengths
    | dict.fromkeys(("color", "contrast", "brightness", "sharpness"), _PAPER_FACTOR)
    | dict.fromkeys(("translate-x", "translate-y"), Strength(0, 0.3, signed=True, whole=True, of_side=True))
    | {"posterize": Strength(4, 4, whole=True)},
    per_image=2,
    probability=0.5,
    magnitudes=10,
    cutout=(0.5, 0.5),
)

# microsoft/Semi-supervised-learning: semilearn/datasets/augmentation/randaugment.py, RandAugment(3, 5), where the 5 is
# not used. Its square is a pixel larger, too.
_USB = Preset(
    strengths=_PAPER.strengths
    | {
        "rotate": Strength(-30, 60),
        "solarize": Strength(0, 256),
        "posterize": Strength(4, 4, whole=True),
    }
    | dict.fromkeys(("shear-x", "shear-y"), Strength(-0.3, 0.6))
    | dict.fromkeys(("translate-x", "translate-y"), Strength(-0.3, 0.6, of_side=True)),
    per_image=3,
    probability=1.0,
    magnitudes=None,
    cutout=(0.0, 0.5),
    square=(125, 123, 114),
)

RANDAUGMENT: dict[PresetName, Preset] = {"google": _GOOGLE, "paper": _PAPER, "usb": _USB}


@dataclass(frozen=True)
class RandAugment:
    """A weak view, a few operations of :data:`OPERATIONS` on its 8-bit values, and a cutout; every image draws its own.

    Args:
        size: side of the result; without ``weak``, images of another size are brought to it.
        preset: as in FixMatch's code ("google"), its paper, or USB; :data:`RANDAUGMENT` has their numbers.
        weak: what comes first, a flip and a shift or a crop.

    Raises:
        ValueError: there is no such preset.

    >>> images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    >>> RandAugment(32, "google")(images, KeyedRandom(0, "unlabeled", "strong", torch.arange(4))).shape
    torch.Size([4, 3, 32, 32])
    """

    size: int
    preset: PresetName = "google"
    weak: Augmentation | None = None

    def __post_init__(self) -> None:
        if self.preset not in RANDAUGMENT:
            raise ValueError(f"preset must be one of {', '.join(RANDAUGMENT)}, got {self.preset!r}")

    def __call__(self, images: Tensor, random: KeyedRandom) -> Tensor:
        """Of ``[n, 1 or 3, height, width]``, uint8 or in [0, 1]: ``[n, channels, size, size]`` float32 in [0, 1]."""
        preset = RANDAUGMENT[self.preset]
        if self.weak is None:
            images, moves, reflected = centre(images, self.size), None, False
        else:
            images, moves, reflected = started(self.weak, images, random)
        drawn = self._drawn(preset, random, images.device)
        return view(images, moves, *drawn, reflected=reflected, fill=preset.fill, square=preset.square)

    def _drawn(self, preset: Preset, random: KeyedRandom, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Operations and levels ``[n, per_image + 1]``, the last one a cutout, and the places of cutouts."""
        count = preset.per_image
        uniform = random.uniform(4 * count + 3).to(device)
        which, magnitude, apply, sign = uniform[:, : 4 * count].unflatten(1, (4, count)).unbind(1)
        place = (which * len(preset.strengths)).long()
        codes, first, span, signed, whole, of_side = (column[place] for column in _columns(self.preset, device))
        operations = codes.long().where(apply < preset.probability, CODES["identity"])
        if preset.magnitudes is not None:
            magnitude = (magnitude * (preset.magnitudes - 1)).floor() + 1
        moved = magnitude.double() * span / (preset.magnitudes or 1) * (1 + of_side * (self.size - 1))
        moved = moved.trunc().where(whole > 0, moved)
        levels = first * (1 + of_side * (self.size - 1)) + moved.neg().where((signed > 0) & (sign < 0.5), moved)
        # the square
        least, greatest = preset.cutout
        middle, share = uniform[:, 4 * count :].split([2, 1], dim=1)
        middle = middle * self.size
        middle = (middle.floor() if preset.cutout_at_corners else middle).unsqueeze(1)
        side = (least + (greatest - least) * share) * self.size
        operations = torch.cat([operations, torch.full_like(operations[:, :1], CODES["cutout"])], dim=1)
        levels = torch.cat([levels.float(), side], dim=1)
        return operations, levels, middle.expand(-1, count + 1, -1)


@functools.lru_cache(maxsize=16)
def _columns(name: PresetName, device: torch.device) -> tuple[Tensor, ...]:
    """The operations' codes, and what a :class:`Strength` has, ``[operations]`` float64 each."""
    strengths = RANDAUGMENT[name].strengths
    rows = [(CODES[name], *map(float, strength)) for name, strength in strengths.items()]
    return torch.tensor(rows, dtype=torch.float64).to(device).unbind(1)
