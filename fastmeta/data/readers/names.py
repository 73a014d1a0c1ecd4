"""Many names in two arrays."""

import os
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np


def base_name(path: str | os.PathLike[str]) -> str:
    """The last name of a path, of "." and ".." too.

    >>> base_name("photos/cats/..")
    'photos'
    """
    return os.path.basename(os.path.abspath(path))


def printable(name: str) -> str:
    r"""A name as text that can be written anywhere; bytes of a file's name that are no UTF-8 are spelled out.

    >>> print(printable(os.fsdecode(b"caf\xe9.png")), printable("café.png"))
    caf\xe9.png café.png
    """
    return os.fsencode(name).decode(errors="backslashreplace")


class Names(Sequence[str]):
    """Names of files, a byte a character: a million takes what they take on disk, and no worker that reads copies them.

    Args:
        names: in their order.
        prefix: of every name.

    >>> names = Names(["cat/a 1.jpg", "dog/é.png"], "photos/")
    >>> names[1], len(names), names[-2:]
    ('photos/dog/é.png', 2, ['photos/cat/a 1.jpg', 'photos/dog/é.png'])
    """

    def __init__(self, names: Iterable[str], prefix: str = "") -> None:
        self._prefix = prefix
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
        return self._prefix + os.fsdecode(self._bytes[self._ends[place] : self._ends[place + 1]])

    def digest(self) -> bytes:
        """All names without the prefix as bytes, for a fingerprint."""
        return self._bytes + self._ends.tobytes()
