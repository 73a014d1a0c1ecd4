"""Images and their readers, splits, streams and augmentation."""

from fastmeta.data.augment import (
    Augmentation,
    AugmentationConfig,
    Plain,
    RandomCrop,
    Shift,
    StrongAugment,
    StrongPicture,
    Views,
    views_for,
    weak_augment,
)
from fastmeta.data.digits import load_digits, split_digits
from fastmeta.data.features import FeatureImages, FrozenFeatures, frozen_features, restore_head
from fastmeta.data.foreign import WithForeignClasses, with_foreign_classes
from fastmeta.data.images import DataError, ImageDataset, Images, UnreadableImage
from fastmeta.data.memory_map import save_images
from fastmeta.data.mnist import load_mnist_5k
from fastmeta.data.photographs import load_photographs
from fastmeta.data.random_numbers import KeyedRandom
from fastmeta.data.readers.open import open_images, open_pictures
from fastmeta.data.reading import Read, read_in_order
from fastmeta.data.sampler import BatchSampler, StatelessSampler
from fastmeta.data.seeding import generator_for
from fastmeta.data.split import Split, make_split, record
from fastmeta.data.streams import Rows, Stream

__all__ = [
    "Augmentation",
    "AugmentationConfig",
    "BatchSampler",
    "DataError",
    "FeatureImages",
    "FrozenFeatures",
    "ImageDataset",
    "Images",
    "KeyedRandom",
    "Plain",
    "RandomCrop",
    "Read",
    "Rows",
    "Shift",
    "Split",
    "StatelessSampler",
    "Stream",
    "StrongAugment",
    "StrongPicture",
    "UnreadableImage",
    "Views",
    "WithForeignClasses",
    "frozen_features",
    "generator_for",
    "load_digits",
    "load_mnist_5k",
    "load_photographs",
    "make_split",
    "open_images",
    "open_pictures",
    "read_in_order",
    "record",
    "restore_head",
    "save_images",
    "split_digits",
    "views_for",
    "weak_augment",
    "with_foreign_classes",
]
