"""What the parts of a training step take."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastmeta.training.trainer import Trainer

PARTS = ("wait", "views", "forward", "refine", "backward", "optimizer", "average", "rest")


class Stopwatch:
    """Adds up the seconds of each part of a trainer's steps; what is called within a part is counted by itself.

    ``wait`` is for images to be read, ``views`` their augmentation, ``forward`` the base's loss without ``refine``, the
    method; ``optimizer`` has the check for finite gradients. On a GPU each part waits for the device, so that parts are
    its time and their sum is more than that of a step which does not.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._within: list[float] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Steps within the block are counted."""
        trainer, backward = self.trainer, torch.Tensor.backward
        places: list[tuple[Any, str, str]] = [
            (trainer, "_base_loss", "forward"),
            (trainer, "_update", "optimizer"),
            (trainer.average, "update", "average"),
        ]
        if trainer.method is not None:
            places.append((trainer.method.method, "refine", "refine"))
        batches, waited = trainer.batches, trainer.batches.waited
        trainer.batches = _Counted(batches, self)  # type: ignore[assignment]
        for owner, name, part in places:
            vars(owner)[name] = self.counted(part, getattr(owner, name))
        torch.Tensor.backward = self.counted("backward", backward)  # type: ignore[method-assign]
        begin = self._now()
        try:
            yield
            total = self._now() - begin
        finally:
            torch.Tensor.backward = backward  # type: ignore[method-assign]
            for owner, name, _ in places:
                del vars(owner)[name]
            trainer.batches = batches
        wait = batches.waited - waited
        self.seconds["wait"] += wait
        self.seconds["views"] -= wait
        self.seconds["rest"] += total - sum(self.seconds.values())

    def counted(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose own time is the part's."""

        def call(*arguments: Any, **named: Any) -> Any:
            self._within.append(0.0)
            begin = self._now()
            result = function(*arguments, **named)
            elapsed = self._now() - begin
            self.seconds[part] += elapsed - self._within.pop()
            if self._within:
                self._within[-1] += elapsed
            return result

        return call

    def _now(self) -> float:
        if self.trainer.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class _Counted:
    """Batches whose making is counted; Python looks ``__call__`` up in the class."""

    def __init__(self, batches: Any, watch: Stopwatch) -> None:
        self._batches = batches
        self._call = watch.counted("views", batches)

    def __call__(self, number: int) -> Any:
        return self._call(number)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)
