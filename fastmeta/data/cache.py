"""Pictures decoded once, into a memory map in a cache folder."""

import json
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fastmeta.data.collection import DecodedImages
from fastmeta.data.images import DataError, Images, fingerprint_of
from fastmeta.data.memory_map import INDEX, UNFINISHED, Chunk, MappedImages, read_chunk, write_map
from fastmeta.data.pictures import SMALL

GIGABYTES = 4.0  # larger images than 96 pixels are stored up to here, smaller ones always
_FORMAT = 1  # of pixels: a change of how pictures are decoded counts it up
_CHUNK_BYTES = 4 * 2**20
_ALONE = 1.0  # seconds of decoding that are not worth other processes


def cache_folder() -> Path:
    """Where decoded images are kept: ``FASTMETA_CACHE``, or ``~/.cache/fastmeta``; it may be deleted at any time."""
    return Path(os.environ.get("FASTMETA_CACHE") or Path.home() / ".cache" / "fastmeta")


def cached(images: DecodedImages, gigabytes: float = GIGABYTES) -> Images:
    """The images from a memory map, which is written first if it is not there; they themselves if they are too many.

    It is found again by the paths, sizes and times of the files and the form of the pixels. Processes that want the
    same one wait for the first. Where it cannot be written there is a warning, and pictures are decoded each time.
    """
    size = len(images) * torch.Size(images.image_shape).numel()
    if images.canvas > SMALL and size > gigabytes * 1e9:
        return images
    key = fingerprint_of(_FORMAT, images.collection.stamp, len(images), images.mode, images.canvas)
    folder = cache_folder() / f"{images.name}-{key}"
    try:
        if not (folder / INDEX).exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _alone(folder):
                if not (folder / INDEX).exists():
                    _write(images, folder, size)
        return _read(images, folder)
    except (OSError, DataError) as error:
        warnings.warn(
            f"{folder} cannot be written or read ({error}): pictures are decoded each time they are read; "
            "FASTMETA_CACHE names another folder",
            stacklevel=2,
        )
        return images


def _read(images: DecodedImages, folder: Path) -> MappedImages:
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    unreadable = {int(place): cause for place, cause in index["unreadable"].items()}
    found = images.collection
    return MappedImages(
        found.name, folder, found.classes, found.targets, found.parts, found.names, found.fingerprint, unreadable
    )


def _write(images: DecodedImages, folder: Path, size: int) -> None:
    for left in folder.parent.glob(f".{folder.name}.*{UNFINISHED}"):  # of a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    free = shutil.disk_usage(folder.parent).free
    if size > free:
        raise OSError(f"{size / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free")

    def index(unreadable: dict[int, str]) -> dict[str, Any]:
        return {"unreadable": unreadable}

    write_map(folder, (len(images), *images.image_shape), _chunks(images), index)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Held by one process at a time on a machine; a process that ends, however it ends, lets go of it."""
    import fcntl

    with open(folder.parent / f".{folder.name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


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
