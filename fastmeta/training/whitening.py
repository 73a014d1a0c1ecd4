"""The whitening of a run: computed once, from the images that training reads, and kept with the run."""

import math
from pathlib import Path

import torch

from fastmeta.data import Images, Split
from fastmeta.data.augment.whitening import LARGEST, Whitening, contrast_normalized, second_moments
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

    Each process reads its part of them. With more images than numbers an image, the cost is that of the eigenvalues of
    a matrix: of the order of a minute for 32 by 32 colored pixels.

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
    mine = processes.part(len(places))
    normalized = (
        (read.places, contrast_normalized(read.images.to(device), size))
        for read in read_in_order(images, places[mine], batch_size=_BATCH, workers=workers)
        if len(read.places)
    )
    if len(places) > count:
        moments = torch.zeros(count + 1, count + 1, dtype=torch.float64, device=device)
        for _, rows in normalized:
            moments += second_moments(rows)
        whitening = Whitening.of(processes.sum_(moments), shape)
    else:
        every = torch.zeros(len(places), count + 1, dtype=torch.float64, device=device)  # with 1 where one was read
        for read_places, rows in normalized:
            at = torch.searchsorted(places, read_places).to(device)
            every[at, :-1], every[at, -1] = rows, 1
        processes.sum_(every)
        whitening = Whitening.of_few(every[every[:, -1] > 0, :-1], shape)
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
