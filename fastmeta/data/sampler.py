"""The data order as a function of the step: no iterator, so nothing to save and nothing to replay on resume."""

import torch
from torch import Tensor

from fastmeta.data.seeding import generator_for


class StatelessSampler:
    """Batches from an endless sequence of shuffled passes over the data.

    Batch ``step`` is places ``step * B .. (step + 1) * B`` of that sequence; a batch may span passes, so one larger
    than the data repeats examples, each equally often up to one.

    Args:
        num_examples: M.
        batch_size: B.
        seed: the order's seed.
        stream: a name that keeps two samplers of one seed unrelated.

    Raises:
        ValueError: ``num_examples`` or ``batch_size`` is less than 1.

    >>> sampler = StatelessSampler(5, 4, seed=0, stream="labeled")
    >>> sorted(torch.cat([sampler.batch(step) for step in range(5)]).tolist()) == sorted(list(range(5)) * 4)
    True
    """

    def __init__(self, num_examples: int, batch_size: int, *, seed: int, stream: str) -> None:
        if num_examples < 1 or batch_size < 1:
            raise ValueError(f"num_examples and batch_size must be at least 1, got {num_examples} and {batch_size}")
        self.num_examples, self.batch_size = num_examples, batch_size
        self.seed, self.stream = seed, stream
        self._pass: tuple[int, Tensor] | None = None  # only a cache of the last permutation

    def batch(self, step: int) -> Tensor:
        """Indices of batch ``step``. ``[B]``, int64, on the CPU."""
        start = step * self.batch_size
        end = start + self.batch_size
        pieces = []
        while start < end:
            number, offset = divmod(start, self.num_examples)
            piece = self._permutation(number)[offset : offset + end - start]
            pieces.append(piece)
            start += len(piece)
        return torch.cat(pieces)

    def _permutation(self, number: int) -> Tensor:
        if self._pass is None or self._pass[0] != number:
            order = torch.randperm(self.num_examples, generator=generator_for(self.seed, self.stream, number))
            self._pass = number, order
        return self._pass[1]
