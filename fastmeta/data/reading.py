"""Images read in their order, by several processes where that is asked for, for evaluation and prediction."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastmeta.data.images import Images, UnreadableImage


@dataclass(frozen=True)
class Read:
    """Some images.

    Args:
        places: of those that could be read ``[n]``.
        images: ``[n, channels, height, width]``.
        unreadable: the others, by name, and why.
    """

    places: Tensor
    images: Tensor
    unreadable: dict[str, str]


def read_in_order(images: Images, places: Tensor, *, batch_size: int, workers: int = 0) -> Iterator[Read]:
    """The images at ``places``, ``batch_size`` at a time; those that cannot be read are left out and named.

    >>> from fastmeta.data import load_digits
    >>> [len(read.places) for read in read_in_order(load_digits(), torch.arange(5), batch_size=2)]
    [2, 2, 1]
    """
    chunks = [places[start : start + batch_size] for start in range(0, len(places), batch_size)]
    yield from DataLoader(_Chunks(images, chunks), batch_size=None, num_workers=min(workers, len(chunks)))


class _Chunks(Dataset[Read]):
    def __init__(self, images: Images, chunks: Sequence[Tensor]) -> None:
        self.images, self.chunks = images, chunks

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, number: int) -> Read:
        places = self.chunks[number]
        try:
            return Read(places, self.images.get(places), {})
        except UnreadableImage:
            pass
        read, unreadable = [], {}
        for place in places.split(1):
            try:
                read.append((place, self.images.get(place)))
            except UnreadableImage as error:
                unreadable[error.description] = error.cause
        if not read:
            return Read(places[:0], torch.empty(0, *self.images.image_shape), unreadable)
        return Read(torch.cat([place for place, _ in read]), torch.cat([image for _, image in read]), unreadable)
