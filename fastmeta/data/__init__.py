"""Datasets, splits, data order and augmentation."""

from fastmeta.data.augment import StrongAugment, weak_augment
from fastmeta.data.digits import load_digits, split_digits
from fastmeta.data.images import DataError, ImageDataset, Images, UnreadableImage
from fastmeta.data.sampler import StatelessSampler
from fastmeta.data.seeding import generator_for
from fastmeta.data.split import Split, make_split, record

__all__ = [
    "DataError",
    "ImageDataset",
    "Images",
    "Split",
    "StatelessSampler",
    "StrongAugment",
    "UnreadableImage",
    "generator_for",
    "load_digits",
    "make_split",
    "record",
    "split_digits",
    "weak_augment",
]
