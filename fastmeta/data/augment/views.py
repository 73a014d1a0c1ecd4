"""The views of an image that a run uses, by name."""

from dataclasses import dataclass
from typing import Literal, cast, get_args

from torch import Tensor

from fastmeta.data.augment.augmentation import Augmentation, PlainView
from fastmeta.data.augment.ctaugment import CTAugment
from fastmeta.data.augment.noisy import Noisy
from fastmeta.data.augment.pictures import StrongPicture
from fastmeta.data.augment.pixels import centre, to_unit
from fastmeta.data.augment.randaugment import PresetName, RandAugment
from fastmeta.data.augment.settings import AugmentationConfig
from fastmeta.data.augment.strong import StrongAugment
from fastmeta.data.augment.weak import RandomCrop, Shift
from fastmeta.data.augment.whitening import Whitened, Whitening
from fastmeta.data.random_numbers import KeyedRandom
from fastmeta.data.readers.pictures import SMALL

ViewsName = Literal["auto", "digits", "pictures", "none"]
LARGEST_DRAWING = 32  # "auto" takes smaller gray images for drawings or writing


@dataclass(frozen=True)
class Plain:
    """The middle of the image, as evaluation sees it."""

    size: int

    def __call__(self, images: Tensor, random: KeyedRandom | None = None) -> Tensor:
        """Of ``[n, channels, height, width]`` in [0, 1] or uint8: ``[n, channels, size, size]`` float32 in [0, 1]."""
        return to_unit(centre(images, self.size))


@dataclass(frozen=True)
class Views:
    """Weak and strong augmentation, and the image as it is.

    Args:
        weak: a weak view.
        strong: a strong one.
        plain: what evaluation sees.
        policy: what the strong view is drawn from, where training moves it.
    """

    weak: Augmentation
    strong: Augmentation
    plain: PlainView
    policy: CTAugment | None = None


def views_for(
    name: ViewsName,
    image_shape: tuple[int, ...],
    image_size: int,
    augmentation: AugmentationConfig | None = None,
    whitening: Whitening | None = None,
) -> Views:
    """The views that suit images of a kind.

    - ``digits``: weak shifts by a pixel, strong distorts, shades and cuts out; nothing is flipped by itself.
    - ``pictures``, up to 96 pixels: weak flips and shifts by up to an eighth; strong flips, draws two RandAugment-style
      operations and cuts out. Larger ones: the same of a random crop.
    - ``none``: the images as they are.
    - ``auto``: ``digits`` for gray images of up to 32 pixels, else ``pictures``.

    Papers' weak views are those of ``pictures`` (MixMatch, FixMatch, Learning to Impute; 4 pixels of 32, reflected),
    with ``padding="zeros"`` (Meta-Gradient), with ``shift=2`` (Oliver et al., Label Gradient Alignment), and without a
    ``flip`` for house numbers.

    Args:
        name: one of these.
        image_shape: ``(channels, height, width)`` of what is stored.
        image_size: side of what the network sees.
        augmentation: what is to be otherwise; None: nothing. With a ``shift`` or a ``padding`` of its own the weak view
            of larger pictures shifts their middle.
        whitening: comes before all else; None: pixels as they are.

    Raises:
        ValueError: ``name`` is none of these, ``image_size`` is less than 2, or the augmentation is out of its range.

    >>> views_for("auto", (3, 32, 32), 32).weak
    Shift(size=32, pixels=4, padding='reflected', flip=True)
    >>> views_for("auto", (3, 32, 32), 32, AugmentationConfig(shift=2, flip=False)).weak
    Shift(size=32, pixels=2, padding='reflected', flip=False)
    """
    if name not in get_args(ViewsName):
        raise ValueError(f"views must be one of {', '.join(get_args(ViewsName))}, got {name!r}")
    if image_size < 2:
        raise ValueError(f"image_size must be at least 2, got {image_size}")
    chosen = augmentation or AugmentationConfig()
    chosen.check()
    if image_shape[0] not in (1, 3) and chosen.strong not in ("auto", "weak"):
        raise ValueError(
            f"augmentation.strong must be auto or weak for images of {image_shape[0]} channels, got {chosen.strong!r}"
        )
    if name == "auto":
        name = "digits" if image_shape[0] == 1 and image_size <= LARGEST_DRAWING else "pictures"
    weak = _weak(name, image_size, chosen)
    strong = _strong(name, image_size, chosen, weak)
    policy = strong if isinstance(strong, CTAugment) and strong.adapt else None
    plain: PlainView = Plain(image_size)
    if whitening is not None:
        weak = strong = Whitened(whitening, weak)
        plain = whitening
    if chosen.noise:
        weak, strong = Noisy(weak, chosen.noise), Noisy(strong, chosen.noise)
    return Views(weak, strong, plain, policy)


def _weak(name: ViewsName, size: int, chosen: AugmentationConfig) -> Augmentation:
    pictures = name == "pictures"
    flip = pictures if chosen.flip is None else chosen.flip
    if pictures and size > SMALL and chosen.shift is None and chosen.padding is None:
        return RandomCrop(size, flip=flip)
    pixels = chosen.shift
    if pixels is None:
        pixels = max(1, size // 8) if pictures else 1 if name == "digits" else 0
    if not pixels and not flip:
        return Plain(size)
    return Shift(size, pixels, chosen.padding or ("reflected" if pictures else "zeros"), flip)


def _strong(name: ViewsName, size: int, chosen: AugmentationConfig, weak: Augmentation) -> Augmentation:
    if chosen.strong == "auto" and chosen.whitening == "none":
        if name == "digits":
            return StrongAugment(size, flip=chosen.flip is True)
        if name == "pictures":
            crop = weak if isinstance(weak, RandomCrop) else None
            return StrongPicture(size, crop=crop, flip=chosen.flip is not False)
    if chosen.strong.startswith("randaugment-"):
        return RandAugment(size, cast(PresetName, chosen.strong.removeprefix("randaugment-")), weak)
    if chosen.strong == "ctaugment":
        return CTAugment(size, weak, threshold=chosen.threshold, cutout=chosen.cutout, adapt=chosen.adapt)
    return weak
