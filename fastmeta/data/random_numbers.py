"""Random numbers of an example: functions of its number in the stream, not of the batch or process it is in."""

import hashlib
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

Integers = Any  # an int64 array or tensor

# SplitMix64 (Steele, Lea, Flood 2014): a Weyl sequence put through a 64-bit finaliser. int64 wraps as uint64 does.
_WEYL = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


class KeyedRandom:
    """Random numbers, a row an example, keyed by ``(seed, stream, view, k)``.

    A number depends on these four and on how many its row drew before; so a row is the same whatever batch, process or
    device it is drawn in, and there is nothing to store. Draws run on the device of ``keys``: nothing is copied, nobody
    waits, and a CUDA graph can hold them.

    Args:
        seed: of the run.
        stream: name of the stream.
        view: name of the view: two views of one example are unrelated.
        keys: ``[n]`` int64, the examples' numbers k in the stream.

    Raises:
        ValueError: ``keys`` are not int64 ``[n]``.

    >>> both = KeyedRandom(0, "labeled", "weak", torch.tensor([7, 8])).uniform(3)
    >>> both[1:].equal(KeyedRandom(0, "labeled", "weak", torch.tensor([8])).uniform(3))
    True
    """

    def __init__(self, seed: int, stream: str, view: str, keys: Tensor) -> None:
        if keys.dtype != torch.int64 or keys.dim() != 1:
            raise ValueError(f"keys must be int64 [n], got {keys.dtype} {list(keys.shape)}")
        digest = hashlib.blake2b(repr((seed, stream, view)).encode(), digest_size=8).digest()
        base = int.from_bytes(digest, "little", signed=True)
        # NumPy's calls cost a third of torch's on the CPU; the operators below are the same for both
        self._rows = _mix((keys.numpy() if keys.device.type == "cpu" else keys) * _WEYL + base)[:, None]
        self._drawn = 0

    def uniform(self, columns: int) -> Tensor:
        """``[n, columns]`` float32, uniform over the multiples of 2^-24 in [0, 1)."""
        bits = self._bits(columns)
        bits >>= 40
        bits &= 2**24 - 1
        return torch.as_tensor(bits).to(torch.float32).mul_(2.0**-24)

    def integers(self, low: int, high: int, columns: int) -> Tensor:
        """``[n, columns]`` int64, uniform over ``low .. high - 1``.

        Raises:
            ValueError: that is empty or has more than 2^31 numbers.
        """
        if not 0 < high - low <= 2**31:
            raise ValueError(f"high - low must lie in 1 .. 2**31, got {high} - {low}")
        bits = self._bits(columns)
        bits >>= 32
        bits &= 2**32 - 1
        bits *= high - low
        bits >>= 32
        return torch.as_tensor(bits).add_(low)

    def normal(self, columns: int) -> Tensor:
        """``[n, columns]`` float32, standard normal (Box and Muller, 1958), up to 5.8 in size."""
        half = (columns + 1) // 2
        length, angle = self.uniform(half), self.uniform(half).mul_(2 * math.pi)
        length = length.neg_().log1p_().mul_(-2).sqrt_()
        return torch.cat([length * angle.cos(), length * angle.sin()], dim=1)[:, :columns]

    def _bits(self, columns: int) -> Integers:
        first, last = self._drawn + 1, self._drawn + columns
        self._drawn = last
        if isinstance(self._rows, Tensor):
            return _mix(self._rows + torch.arange(first, last + 1, device=self._rows.device) * _WEYL)
        return _mix(self._rows + np.arange(first, last + 1, dtype=np.int64) * _WEYL)


def _mix(state: Integers) -> Integers:
    """SplitMix64's finaliser, in place: ``state`` becomes 64 bits that look unrelated for unequal states."""
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        state ^= (state >> shift) & (2 ** (64 - shift) - 1)  # a shift of the sign would fill in ones
        state *= factor
    state ^= (state >> 31) & (2**33 - 1)
    return state
