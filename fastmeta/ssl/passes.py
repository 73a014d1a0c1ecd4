"""One forward of several parts of a batch, and whose batch statistics each part is normalized by."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from fastmeta.capture import FeatureTape
from fastmeta.ssl.base import Refiner, features_for, frozen_statistics

Statistics = Literal["joined", "separate", "interleaved"]
Item = TypeVar("Item")


def forward_parts(model: nn.Module, parts: Sequence[Tensor], statistics: Statistics) -> list[Tensor]:
    """The logits of each part, ``[n, C]``.

    - ``joined``: one batch of all parts; running statistics are moved by all of them (FixMatch, UDA).
    - ``separate``: each part is a batch; running statistics are moved by the first (the mean teacher, Pi-model,
      pseudo-labels and mix-up of the MixMatch repository, where the first part is the labeled one).
    - ``interleaved``: as many batches as parts, of which the first has a share of every part, and each other one is a
      part with a share of the first part in place of its own; running statistics are moved by the first (MixMatch).

    They differ for batch normalization alone. Of several processes each does so with its own images.

    Args:
        model: in training mode.
        parts: images, each ``[n, ...]``.
        statistics: one of these.
    """
    if statistics == "joined":
        return list(model(torch.cat(list(parts))).split([len(part) for part in parts]))
    if statistics == "separate":
        return _batches(model, parts)
    count = len(parts)
    batches = _interleaved([list(part.split(_shares(len(part), count))) for part in parts])
    logits = _batches(model, [torch.cat(batch) for batch in batches])
    shares = [list(each.split([len(share) for share in batch])) for each, batch in zip(logits, batches, strict=True)]
    return [torch.cat(part) for part in _interleaved(shares)]


def _batches(model: nn.Module, batches: Sequence[Tensor]) -> list[Tensor]:
    logits = []
    for number, batch in enumerate(batches):
        with frozen_statistics(model) if number else contextlib.nullcontext():
            logits.append(model(batch))
    return logits


def _shares(length: int, count: int) -> list[int]:
    """As equal as can be, the larger ones last."""
    return [length // count + (share >= count - length % count) for share in range(count)]


def _interleaved(shares: list[list[Item]]) -> list[list[Item]]:
    """Share k of the first part and share k of part k change places; done twice it is undone."""
    swapped = [list(part) for part in shares]
    for k in range(1, len(shares)):
        swapped[0][k], swapped[k][k] = shares[k][k], shares[0][k]
    return swapped


@contextlib.contextmanager
def guessing(model: nn.Module, refiner: Refiner | None) -> Iterator[tuple[nn.Module, FeatureTape | None]]:
    """Passes whose predictions are constants, unless a method's loss has a gradient; running statistics stay.

    Yields:
        The model to call, in training mode, and the features of its last layer where a method asks for them.
    """
    network = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    on_graph = refiner is not None and refiner.method.update.needs_graph
    with features_for(refiner, network) as tape, frozen_statistics(network), torch.set_grad_enabled(on_graph):
        yield network, tape
