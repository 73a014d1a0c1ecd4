"""Endless streams of images: a DataLoader over a stateless order, so that one integer resumes it."""

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastmeta.data.images import DataError, Images, UnreadableImage
from fastmeta.data.sampler import BatchSampler, StatelessSampler, rows_of
from fastmeta.data.worker_signals import leave_signals_to_the_parent, sigterm_blocked

NAMED_FILES = 5  # how many an error about unreadable images names


@dataclass(frozen=True)
class Rows:
    """A process's rows of a batch, on the stream's device.

    Args:
        images: ``[n, channels, height, width]``, uint8 or floating point in [0, 1].
        places: ``[n]`` int64, places in the whole.
        index: ``[n]`` int64, places in the part.
        keys: ``[n]`` int64, the rows' numbers k in the stream: what keys their augmentation.
    """

    images: Tensor
    places: Tensor
    index: Tensor
    keys: Tensor


class Stream:
    """A part of the images, shuffled anew in each pass, without end.

    Its k-th example is a function of ``(seed, name, k)``: order, replacements and pixels depend neither on the number
    of processes nor on that of workers, and a stream made at ``position`` gives what one from 0 gives from there on.

    An unreadable image is replaced by the next readable one of the part (of its class, with ``keep_class``), which
    ``places`` and ``index`` then name; :attr:`unreadable` lists it.

    Args:
        images: the whole.
        places: ``[P]`` int64, the part: places in the whole.
        batch_size: B, rows of a batch over all processes.
        seed: of the order.
        name: of the stream; two of one seed are unrelated.
        position: the number k of the first row, a multiple of B.
        steps: how many batches to give from there; None: no end.
        rank: of this process, which gets rows ``rank * B // processes`` up to those of the next.
        processes: how many share each batch.
        workers: processes that read ahead; 0 reads in this one when asked.
        device: where rows go.
        max_unreadable: share of the part that may be unreadable; one image always may.
        keep_class: replace an unreadable image by one of its class. None: where all of the part is labeled, unless its
            name is "unlabeled": labels that training must not read decide nothing.

    Attributes:
        position: k of the next row: all that a resume needs.
        waited: seconds spent in ``next``.
        unreadable: what could not be read so far, by description, and why.

    Raises:
        ValueError: an argument is out of its range.
        DataError: from ``next``: more is unreadable than ``max_unreadable``, or all that could replace an image.
        StopIteration: from ``next``: after ``steps`` batches.

    >>> from fastmeta.data import ImageDataset
    >>> images = ImageDataset("ten", torch.rand(10, 1, 8, 8), torch.arange(10) // 5, 2)
    >>> stream = Stream(images, torch.arange(10), batch_size=4, seed=0, name="unlabeled")
    >>> rows = [next(stream) for _ in range(3)]
    >>> resumed = Stream(images, torch.arange(10), batch_size=4, seed=0, name="unlabeled", position=8)
    >>> next(resumed).images.equal(rows[2].images)
    True
    """

    def __init__(
        self,
        images: Images,
        places: Tensor,
        *,
        batch_size: int,
        seed: int,
        name: str,
        position: int = 0,
        steps: int | None = None,
        rank: int = 0,
        processes: int = 1,
        workers: int = 0,
        device: torch.device | str = "cpu",
        max_unreadable: float = 0.01,
        keep_class: bool | None = None,
    ) -> None:
        if places.dtype != torch.int64 or places.dim() != 1 or not len(places):
            raise ValueError(f"places must be int64 [P], P > 0, got {places.dtype} {list(places.shape)} for {name}")
        if not 0 <= int(places.min()) <= int(places.max()) < len(images):
            raise ValueError(f"places must lie in [0, {len(images)}), got {int(places.min())} to {int(places.max())}")
        if not 0 <= rank < processes <= batch_size:
            raise ValueError(
                f"rank, processes and batch_size must be 0 <= rank < processes <= batch_size, got {rank}, {processes} "
                f"and {batch_size}"
            )
        if position < 0 or position % batch_size:
            raise ValueError(f"position must be a multiple of batch_size {batch_size}, got {position}")
        if workers < 0:
            raise ValueError(f"workers must be at least 0, got {workers}")
        if not 0 <= max_unreadable <= 1:
            raise ValueError(f"max_unreadable must lie in [0, 1], got {max_unreadable}")
        targets = images.targets[places]
        if keep_class is None:
            keep_class = name != "unlabeled" and bool((targets >= 0).all())
        self.name, self.batch_size, self.device = name, batch_size, torch.device(device)
        self.position, self.waited = position, 0.0
        self.unreadable: dict[str, str] = {}
        self._allowed = max(1, int(max_unreadable * len(places)))
        self._part = _Part(images, places, targets if keep_class else None)
        self._sampler = StatelessSampler(len(places), batch_size, seed=seed, stream=name)
        self._end = None if steps is None else position + steps * batch_size
        self._rank, self._processes, self._workers = rank, processes, workers
        self._iterator: Iterator[_Read] | None = None

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Rows:
        begin = time.perf_counter()
        if self._iterator is None:
            with sigterm_blocked():
                self._iterator = iter(self._loader())
        read = next(self._iterator)
        images = self._checked(read)
        first = self.position + rows_of(self._rank, self._processes, self.batch_size)[0]
        rows = Rows(
            images.to(self.device, non_blocking=True),
            read.places.to(self.device, non_blocking=True),
            read.rows.to(self.device, non_blocking=True),
            torch.arange(first, first + len(read.rows), device=self.device),
        )
        self.position += self.batch_size
        self.waited += time.perf_counter() - begin
        return rows

    def close(self) -> None:
        """End the workers; the next ``next`` starts new ones."""
        self._iterator = None

    def _loader(self) -> DataLoader:
        steps = None if self._end is None else (self._end - self.position) // self.batch_size
        batches = BatchSampler(
            self._sampler,
            first_step=self.position // self.batch_size,
            steps=steps,
            rank=self._rank,
            processes=self._processes,
        )
        return DataLoader(
            self._part,
            batch_sampler=batches,  # type: ignore[arg-type]
            collate_fn=_unchanged,
            num_workers=self._workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=leave_signals_to_the_parent,
            generator=torch.Generator(),  # else it draws a number, which nobody needs, from the global one
        )

    def _checked(self, read: "_Read") -> Tensor:
        self.unreadable.update(read.unreadable)
        if len(self.unreadable) <= self._allowed and read.images is not None:
            return read.images
        limit = "and nothing could replace one" if read.images is None else f"max_unreadable allows {self._allowed}"
        named = [f"{description} ({cause})" for description, cause in self.unreadable.items()][:NAMED_FILES]
        if len(self.unreadable) > NAMED_FILES:
            named.append("...")
        raise DataError(
            f"{len(self.unreadable)} of {len(self._part.places)} images of the {self.name} part cannot be read, "
            f"{limit}: {', '.join(named)}"
        )


class _Read(NamedTuple):
    """What a worker sends for a batch; no images where nothing could replace an unreadable one."""

    images: Tensor | None
    places: Tensor
    rows: Tensor  # of the part
    unreadable: dict[str, str]


class _Part(Dataset[_Read]):
    """Reads rows of a part, and others in place of what cannot be read."""

    def __init__(self, images: Images, places: Tensor, targets: Tensor | None) -> None:
        self.images, self.places, self.targets = images, places, targets
        self._causes: dict[int, str] = {}  # met so far, by row of the part: not tried again

    def __getitems__(self, index: Tensor) -> _Read:
        skipped: dict[int, str] = {}
        images: Tensor | None
        rows = self._without_known(index, skipped) if self._causes else index
        try:
            images = self.images.get(self.places[rows])
        except UnreadableImage:
            read = [self._first_readable(row, skipped) for row in index.tolist()]
            rows = torch.tensor([row for row, _ in read])
            pieces = [image for _, image in read if image is not None]
            images = torch.cat(pieces) if len(pieces) == len(read) else None
        unreadable = {self.images.describe(int(self.places[row])): cause for row, cause in skipped.items()}
        return _Read(images, self.places[rows], rows, unreadable)

    def _without_known(self, index: Tensor, skipped: dict[int, str]) -> Tensor:
        rows = index.tolist()
        return torch.tensor([next(self._candidates(row, skipped), row) if row in self._causes else row for row in rows])

    def _first_readable(self, row: int, skipped: dict[int, str]) -> tuple[int, Tensor | None]:
        for candidate in self._candidates(row, skipped):
            try:
                return candidate, self.images.get(self.places[candidate : candidate + 1])
            except UnreadableImage as error:
                self._causes[candidate] = skipped[candidate] = error.cause
        return row, None

    def _candidates(self, row: int, skipped: dict[int, str]) -> Iterator[int]:
        """``row`` and those after it, of its class where classes are kept, without those known to be unreadable."""
        count = len(self.places)
        for candidate in itertools.chain(range(row, count), range(row)):
            if self.targets is not None and self.targets[candidate] != self.targets[row]:
                continue
            if candidate in self._causes:
                skipped[candidate] = self._causes[candidate]
            else:
                yield candidate


def _unchanged(read: Any) -> Any:
    return read
