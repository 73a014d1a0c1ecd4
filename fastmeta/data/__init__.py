"""Datasets, splits, data order and augmentation."""

from fastmeta.data.augment import StrongAugment, weak_augment
from fastmeta.data.dataset import ImageDataset
from fastmeta.data.digits import load_digits
from fastmeta.data.random_numbers import KeyedRandom
from fastmeta.data.sampler import BatchSampler, StatelessSampler
from fastmeta.data.seeding import generator_for
from fastmeta.data.split import Split, make_split
from fastmeta.data.streams import Rows, Stream

__all__ = [
    "BatchSampler",
    "ImageDataset",
    "KeyedRandom",
    "Rows",
    "Split",
    "StatelessSampler",
    "Stream",
    "StrongAugment",
    "generator_for",
    "load_digits",
    "make_split",
    "weak_augment",
]
