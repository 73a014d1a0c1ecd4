"""The batches of a run: streams of images, augmented, as base algorithms take them."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmeta.data import Images, KeyedRandom, Rows, Shift, Split, Stream, Views
from fastmeta.data.landmarks import Landmarks
from fastmeta.data.sampler import rows_of
from fastmeta.ssl import TrainingBatch
from fastmeta.training.config import MachineConfig
from fastmeta.training.probes import STREAM, VIEW
from fastmeta.training.processes import Processes


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on.

    Args:
        images: all of them.
        split: which of them are for what.
        views: the augmentations.
        labeled_batch: labeled images in a step, of all processes.
        unlabeled_batch: unlabeled images in a step, of all processes.
        holdout_batch: hold-out images in a step; None: all of them in every step.
        labeled_view: augmentation of the labeled images, weak or strong.
    """

    images: Images
    split: Split
    views: Views
    labeled_batch: int
    unlabeled_batch: int
    holdout_batch: int | None = None
    labeled_view: str = "weak"


class Batches:
    """A run's batches by number, each process's part of them, from streams that start wherever they are asked to.

    Args:
        data: the images.
        second_view: the second view of the unlabeled images, weak or strong; None for none.
        more_views: further views of that kind.
        holdout: the examples of a method's outer loss; see :class:`fastmeta.ssl.Refiner`.
        fresh: whether those are for :meth:`fresh` alone.
        interval: parts of the run from one update of the method to the next; those between have no such examples.
        seed: of order and augmentation.
        machine: device, workers, memory format, parts of a step.
        processes: those of the run.

    Raises:
        ValueError: a batch has fewer images than there are processes, or parts that they cannot be divided into.
    """

    def __init__(
        self,
        data: TrainingData,
        *,
        second_view: str | None,
        more_views: int = 0,
        holdout: str = "batch",
        fresh: bool = False,
        interval: int = 1,
        seed: int,
        machine: MachineConfig,
        processes: Processes,
    ) -> None:
        self.data, self.second_view, self.more_views = data, second_view, more_views
        self.holdout, self.holdout_is_fresh, self.interval = holdout, fresh, interval
        self.seed, self.machine, self.processes = seed, machine, processes
        self.device = torch.device(machine.device)
        self.targets = data.images.targets.to(self.device)
        self._streams: dict[str, Stream] = {}
        self._unreadable: dict[str, str] = {}  # of streams that are closed
        self._holdout: tuple[Tensor, Tensor] | None = None
        self._check()

    def __call__(self, number: int) -> TrainingBatch:
        """The data of part ``number`` of the run (a step has ``machine.accumulation`` parts)."""
        due = not self.holdout_is_fresh and (number + 1) % self.interval == 0
        return self._batch(number, "", holdout=number // self.interval if due else None)

    def fresh(self, number: int) -> TrainingBatch:
        """The data of update ``number`` of a method that learns from batches of its own."""
        return self._batch(number, "fresh ", holdout=number)

    def _batch(self, number: int, prefix: str, *, holdout: int | None) -> TrainingBatch:
        """Batch ``number`` of the streams whose names start with ``prefix``, and hold-out batch number ``holdout``."""
        parts, second = self.machine.accumulation, self.second_view
        labeled = next(self._stream(prefix, "labeled", self.data.labeled_batch // parts, number))
        if len(self.data.split.unlabeled):
            unlabeled = next(self._stream(prefix, "unlabeled", self.data.unlabeled_batch // parts, number))
        else:  # a base that imputes nothing needs none
            unlabeled = Rows(labeled.images[:0], labeled.places[:0], labeled.places[:0], labeled.keys[:0])
        more = range(3, 3 + self.more_views)
        moved = None
        if isinstance(self.data.images, Landmarks):
            moved = self._moved(unlabeled, prefix + "unlabeled", "second") - self._moved(
                unlabeled, prefix + "unlabeled", "weak"
            )
        batch = TrainingBatch(
            labeled=self._view(labeled, prefix + "labeled", "labeled", self.data.labeled_view),
            targets=self._targets(labeled, prefix + "labeled"),
            weak=self._view(unlabeled, prefix + "unlabeled", "weak", "weak"),
            second=None if second is None else self._view(unlabeled, prefix + "unlabeled", "second", second),
            index=unlabeled.index,
            labeled_share=self.processes.share(len(labeled.places), self.data.labeled_batch // parts),
            unlabeled_share=self.processes.share(len(unlabeled.places), self.data.unlabeled_batch // parts),
            labeled_keys=labeled.keys,
            unlabeled_keys=unlabeled.keys,
            seed=self.seed,
            more=tuple(self._view(unlabeled, prefix + "unlabeled", f"view {k}", second or "weak") for k in more),
            process_group=self.processes.group,
            probe=None if prefix else self._probe(labeled),
            moved=moved,
        )
        if holdout is None or self.holdout == "batch":
            return batch
        images, targets = self._holdout_images(holdout)
        return dataclasses.replace(batch, holdout=images, holdout_targets=targets)

    def _holdout_images(self, number: int) -> tuple[Tensor, Tensor]:
        """Those of the hold-out part as they are, not augmented; each process has its part."""
        parts, size = self.machine.accumulation, self.data.holdout_batch
        if self.holdout == "labeled":
            rows = next(self._stream("outer ", "labeled", (size or self.data.labeled_batch) // parts, number))
            images = self._view(rows, "outer labeled", "labeled", self.data.labeled_view)
            return images, self._targets(rows, "outer labeled")
        if self.holdout == "drawn":
            return self._drawn_images(number, (size or len(self.data.split.holdout)) // parts)
        if size is not None:
            rows = next(self._stream("", "holdout", size // parts, number))
            return self.data.views.plain(rows.images), self.targets[rows.places]
        if self._holdout is None:
            places = self.data.split.holdout[self.processes.part(len(self.data.split.holdout))]
            images = self.data.views.plain(self.data.images.get(places).to(self.device))
            self._holdout = images, self.targets[places.to(self.device)]
        return self._holdout

    def _drawn_images(self, number: int, size: int) -> tuple[Tensor, Tensor]:
        """Drawn with replacement: the k-th image of all batches is a function of k."""
        part = self.data.split.holdout
        keys = number * size + torch.arange(*rows_of(self.processes.rank, self.processes.count, size))
        uniform = KeyedRandom(self.seed, "holdout", "drawn", keys).uniform(1)[:, 0]
        places = part[(uniform.double() * len(part)).long().clamp_max(len(part) - 1)]
        return self.data.views.plain(self.data.images.get(places).to(self.device)), self.targets[places.to(self.device)]

    def _stream(self, prefix: str, part: str, batch_size: int, number: int) -> Stream:
        name = prefix + part
        position = number * batch_size
        if name not in self._streams or self._streams[name].position != position:
            if name in self._streams:
                self._close(name)
            self._streams[name] = Stream(
                self.data.images,
                getattr(self.data.split, part),
                batch_size=batch_size,
                seed=self.seed,
                name=name,
                position=position,
                rank=self.processes.rank,
                processes=self.processes.count,
                workers=self.machine.workers,
                device=self.device,
                keep_class=False if part == "unlabeled" else None,
            )
        return self._streams[name]

    def _view(self, rows: Rows, stream: str, name: str, which: str) -> Tensor:
        augmentation = self.data.views.weak if which == "weak" else self.data.views.strong
        return self._in_order(augmentation(rows.images, KeyedRandom(self.seed, stream, name, rows.keys)))

    def _targets(self, rows: Rows, stream: str) -> Tensor:
        """Of labeled images in their view, which moves landmarks."""
        targets = self.targets[rows.places]
        return targets + self._moved(rows, stream, "labeled") if isinstance(self.data.images, Landmarks) else targets

    def _moved(self, rows: Rows, stream: str, name: str) -> Tensor:
        """What a view adds to landmarks ``[n, K]``."""
        images, shift = self.data.images, self.data.views.weak
        if not isinstance(images, Landmarks) or not isinstance(shift, Shift):
            raise ValueError(f"views.weak must be a Shift, which says how far landmarks move, got {shift!r}")
        return images.moved(shift.moves(rows.images, KeyedRandom(self.seed, stream, name, rows.keys))[1])

    def _probe(self, rows: Rows) -> Tensor | None:
        if self.data.views.policy is None:
            return None
        return self._in_order(
            self.data.views.policy.probe(rows.images, KeyedRandom(self.seed, STREAM, VIEW, rows.keys))
        )

    def _in_order(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last) if self.machine.channels_last else images

    @property
    def waited(self) -> float:
        """Seconds spent waiting for images so far."""
        return sum(stream.waited for stream in self._streams.values())

    @property
    def unreadable(self) -> dict[str, str]:
        """Images that could not be read so far, and why, by their names."""
        return self._unreadable | {
            name: cause for stream in self._streams.values() for name, cause in stream.unreadable.items()
        }

    @unreadable.setter
    def unreadable(self, known: dict[str, str]) -> None:
        self._unreadable = dict(known)

    def positions(self, number: int) -> dict[str, int]:
        """The next example of each stream at batch ``number``: all that a resume needs."""
        sizes = {"labeled": self.data.labeled_batch, "unlabeled": self.data.unlabeled_batch}
        return {name: number * (size // self.machine.accumulation) for name, size in sizes.items()}

    def close(self) -> None:
        """End the processes that read images."""
        for name in list(self._streams):
            self._close(name)

    def _close(self, name: str) -> None:
        self._unreadable |= self._streams[name].unreadable
        self._streams.pop(name).close()

    def _check(self) -> None:
        holdout, used = len(self.data.split.holdout), self.holdout in ("part", "drawn")
        if used and not holdout:
            raise ValueError("split.holdout_per_class must be at least 1 for a method with hold-out labels, got 0")
        if used and holdout < self.processes.count:
            raise ValueError(
                f"processes must be at most the number of hold-out images, {holdout}, got {self.processes.count}"
            )
        for name in ("labeled_batch", "unlabeled_batch", "holdout_batch"):
            size = getattr(self.data, name)
            if size is None:
                continue
            if size % self.machine.accumulation:
                raise ValueError(
                    f"{name} must be a multiple of machine.accumulation, {self.machine.accumulation}, got {size}"
                )
            if size // self.machine.accumulation < self.processes.count:
                raise ValueError(f"{name} must be at least the number of processes, {self.processes.count}, got {size}")
