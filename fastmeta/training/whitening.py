"""The whitening of a run: computed once, from the images that training reads, and kept with the run."""

import math
from pathlib import Path

import torch

from fastmeta.data import Images, Split
from fastmeta.data.augment.whitening import LARGEST, Whitening, second_moments
from fastmeta.data.reading import read_in_order
from fastmeta.training.files import read_checkpoint, write_checkpoint
from fastmeta.training.processes import Processes

_BATCH = 512  # images at once


def agreed_whitening(
    known: Whitening | None,
    images: Images,
    split: Split,
    size: int,
    *,
    workers: int,
    device: str,
    processes: Processes,
) -> Whitening:
    """The whitening of the labeled and unlabeled images, those that can be read; the same on all processes.

    It takes about a minute for 50,000 images of 32 by 32 colored pixels; each process adds up its part of them.

    Args:
        known: that of the run, where all processes have it.
        images: all of them.
        split: which of them training reads.
        size: side of what the net sees.
        workers: processes that read images.
        device: where it is computed.
        processes: those of the run.

    Raises:
        ValueError: the images are too large, or there are fewer than two.
    """
    shape = (images.image_shape[0], size, size)
    count = math.prod(shape)
    if count > LARGEST:
        sides = " x ".join(map(str, shape))
        raise ValueError(
            f"augmentation.whitening must be none for images of more than {LARGEST} numbers, got {sides} = {count}"
        )
    fits = torch.tensor(float(known is not None and known.shape == shape), device=device)
    all_have_it = bool(processes.extremum_(fits, "min"))
    if known is not None and all_have_it:
        return known
    places = torch.cat([split.labeled, split.unlabeled]).unique()
    places = places[processes.part(len(places))]
    moments = torch.zeros(count + 1, count + 1, dtype=torch.float64, device=device)
    for read in read_in_order(images, places, batch_size=_BATCH, workers=workers):
        if len(read.places):
            moments += second_moments(read.images.to(device), size)
    whitening = Whitening.of(processes.sum_(moments), shape)
    processes.broadcast_([whitening.mean, whitening.matrix])  # whose last bits may differ between machines
    return whitening


def read_whitening(folder: Path) -> Whitening | None:
    """That of the run in a folder; None if it has none."""
    held = read_checkpoint(folder / "whitening.pt")
    return None if held is None else Whitening(held["mean"], held["matrix"], tuple(held["shape"]))


def write_whitening(folder: Path, whitening: Whitening) -> None:
    """Keep it with the run."""
    held = {"mean": whitening.mean.cpu(), "matrix": whitening.matrix.cpu(), "shape": list(whitening.shape)}
    write_checkpoint(folder / "whitening.pt", held, fsync=True)
