"""Many names in two arrays."""

import os
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np


class Names(Sequence[str]):
    """Names of files, a byte a character: a million takes what they take on disk, and no worker that reads copies them.

    >>> names = Names(["cat/a 1.jpg", "dog/é.png"])
    >>> names[1], len(names), names[-2:]
    ('dog/é.png', 2, ['cat/a 1.jpg', 'dog/é.png'])
    """

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._bytes = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[index] for index in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(f"place must lie in [0, {len(self)}), got {place}")
        place %= len(self)
        return os.fsdecode(self._bytes[self._ends[place] : self._ends[place + 1]])

    def digest(self) -> bytes:
        """All names as bytes, for a fingerprint."""
        return self._bytes + self._ends.tobytes()
