"""The data order as a function of the step: no iterator, so nothing to save and nothing to replay on resume."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from fastmeta.data.seeding import generator_for


class StatelessSampler:
    """An endless sequence of shuffled passes over the data, read at any place.

    The k-th example is a function of ``(seed, stream, k)``: example ``k % M`` of the permutation of pass ``k // M``. A
    batch may span passes, so one larger than the data repeats examples, each equally often up to one.

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
        return self.places(step * self.batch_size, (step + 1) * self.batch_size)

    def places(self, start: int, stop: int) -> Tensor:
        """Indices of examples ``start .. stop - 1`` of the sequence. ``[stop - start]``, int64, on the CPU.

        Raises:
            ValueError: not ``0 <= start <= stop``.
        """
        if not 0 <= start <= stop:
            raise ValueError(f"start and stop must be 0 <= start <= stop, got {start} and {stop}")
        pieces = [torch.empty(0, dtype=torch.int64)]
        while start < stop:
            number, offset = divmod(start, self.num_examples)
            piece = self._permutation(number)[offset : offset + stop - start]
            pieces.append(piece)
            start += len(piece)
        return torch.cat(pieces)

    def _permutation(self, number: int) -> Tensor:
        if self._pass is None or self._pass[0] != number:
            order = torch.randperm(self.num_examples, generator=generator_for(self.seed, self.stream, number))
            self._pass = number, order
        return self._pass[1]


def rows_of(rank: int, processes: int, batch_size: int) -> tuple[int, int]:
    """First and last + 1 row of a global batch that process ``rank`` has: shares that differ by at most one row.

    >>> [rows_of(rank, 3, 8) for rank in range(3)]
    [(0, 2), (2, 5), (5, 8)]
    """
    return rank * batch_size // processes, (rank + 1) * batch_size // processes


class BatchSampler(Sampler[Tensor]):
    """One process's rows of each batch, for a :class:`torch.utils.data.DataLoader`.

    Args:
        sampler: the order; its batch size is that of all processes together.
        first_step: where to begin.
        steps: how many batches; None: no end.
        rank: of this process.
        processes: how many share each batch.

    >>> sampler = StatelessSampler(100, 8, seed=0, stream="labeled")
    >>> halves = [next(iter(BatchSampler(sampler, first_step=3, rank=rank, processes=2))) for rank in range(2)]
    >>> torch.cat(halves).equal(sampler.batch(3))
    True
    """

    def __init__(
        self,
        sampler: StatelessSampler,
        *,
        first_step: int = 0,
        steps: int | None = None,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.sampler, self.first_step, self.steps = sampler, first_step, steps
        self.rows = rows_of(rank, processes, sampler.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        step = self.first_step
        while self.steps is None or step < self.first_step + self.steps:
            start = step * self.sampler.batch_size
            yield self.sampler.places(start + self.rows[0], start + self.rows[1])
            step += 1
