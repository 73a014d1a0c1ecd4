"""Weak and strong image augmentation: batched, on any device, every image with operations of its own.

Random numbers are keyed by example (:class:`fastmeta.data.KeyedRandom`), so an image's pixels depend on
nothing beside it.
"""

from fastmeta.data.augment.apply import apply_operations
from fastmeta.data.augment.augmentation import Augmentation
from fastmeta.data.augment.ctaugment import CTAugment
from fastmeta.data.augment.noisy import Noisy
from fastmeta.data.augment.operations import CODES, OPERATIONS, Operation
from fastmeta.data.augment.pictures import StrongPicture
from fastmeta.data.augment.randaugment import RANDAUGMENT, RandAugment
from fastmeta.data.augment.settings import AugmentationConfig
from fastmeta.data.augment.strong import StrongAugment
from fastmeta.data.augment.views import Plain, Views, ViewsName, views_for
from fastmeta.data.augment.weak import RandomCrop, Shift, weak_augment
from fastmeta.data.augment.whitening import Whitened, Whitening

__all__ = [
    "CODES",
    "OPERATIONS",
    "RANDAUGMENT",
    "Augmentation",
    "AugmentationConfig",
    "CTAugment",
    "Noisy",
    "Operation",
    "Plain",
    "RandAugment",
    "RandomCrop",
    "Shift",
    "StrongAugment",
    "StrongPicture",
    "Views",
    "ViewsName",
    "Whitened",
    "Whitening",
    "apply_operations",
    "views_for",
    "weak_augment",
]
