"""Pictures decoded once, into a memory map in the cache."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fastmeta.data.cache import cache_folder, stored
from fastmeta.data.images import Images, fingerprint_of
from fastmeta.data.memory_map import INDEX, Chunk, MappedImages, read_chunk, write_map
from fastmeta.data.readers.collection import DecodedImages
from fastmeta.data.readers.pictures import SMALL
from fastmeta.data.readers.unpacked import unpacked

GIGABYTES = 4.0  # images larger than 96 pixels are stored up to here, smaller ones always
_FORMAT = 1  # of pixels: a change of how pictures are decoded counts it up
_CHUNK_BYTES = 4 * 2**20
_ALONE = 1.0  # seconds of decoding that are not worth other processes


def decoded_once(images: DecodedImages, gigabytes: float = GIGABYTES) -> Images:
    """The images from a memory map, which is written first if it is not there.

    It is found again by the paths, sizes and times of the files and the form of the pixels. Where it cannot be written,
    and where images of more than 96 pixels are too many, pictures are decoded each time.
    """
    size = len(images) * torch.Size(images.image_shape).numel()
    if images.canvas > SMALL and size > gigabytes * 1e9:
        return unpacked(images)
    key = fingerprint_of(_FORMAT, images.collection.stamp, len(images), images.mode, images.canvas)

    def write(folder: Path) -> None:
        shape = (len(images), *images.image_shape)
        write_map(folder, shape, _chunks(images), lambda unreadable: {"unreadable": unreadable})

    def read(folder: Path) -> MappedImages | None:
        found = images.collection
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            failed = {int(place): cause for place, cause in index["unreadable"].items()}
            return MappedImages(
                found.name,
                folder,
                found.classes,
                found.targets,
                found.parts,
                found.names,
                found.fingerprint,
                failed,
                found.stamp,
            )
        except (OSError, ValueError, KeyError):  # DataError is a ValueError
            return None

    return stored(cache_folder() / f"{images.name}-{key}", size, read, write) or images


class _Chunks(Dataset[Chunk]):
    def __init__(self, images: DecodedImages, places: tuple[Tensor, ...]) -> None:
        self.images, self.places = images, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> Chunk:
        return read_chunk(self.images, self.places[number])


def _chunks(images: DecodedImages) -> Iterator[Chunk]:
    """All images in order; by several processes where that is worth it."""
    size = max(1, _CHUNK_BYTES // torch.Size(images.image_shape).numel())
    places = torch.arange(len(images)).split(size)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with tqdm(total=len(images), desc=f"decoding {images.name}, once", unit="images", disable=None) as bar:
        start = time.perf_counter()
        first = read_chunk(images, places[0])
        bar.update(len(places[0]))
        yield first
        alone = (time.perf_counter() - start) * (len(places) - 1) < _ALONE
        chunks = _Chunks(images, places[1:])
        workers = 0 if alone else min(cores, len(chunks))
        for pixels, unreadable in DataLoader(chunks, batch_size=None, collate_fn=_as_it_is, num_workers=workers):
            yield pixels, unreadable
            bar.update(len(pixels))


def _as_it_is(chunk: Any) -> Any:
    return chunk
