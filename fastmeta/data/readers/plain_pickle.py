"""Pickles of numbers, names and arrays, read without running what else a pickle may hold."""

import io
import pickle
from typing import Any

import numpy as np

_RECONSTRUCT = np.zeros(0).__reduce__()[0]  # what NumPy's pickles call first; it has had several modules


def _encode(text: str, encoding: str) -> bytes:
    """``_codecs.encode``, which Python 3 writes for bytes in protocols of Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it has bytes as {encoding!r}, which are not loaded")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not loaded") from None


def read_pickle(content: bytes) -> Any:
    """The object in a pickle, of Python 2 as well: its texts are bytes.

    Raises:
        pickle.UnpicklingError: it holds anything else than numbers, texts, lists, dicts and arrays, or is damaged.

    >>> read_pickle(pickle.dumps({"labels": [1, 2]}))
    {'labels': [1, 2]}
    >>> read_pickle(pickle.dumps(print))
    Traceback (most recent call last):
    _pickle.UnpicklingError: it names builtins.print, which is not loaded
    """
    try:
        return _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a damaged one raises anything
        raise pickle.UnpicklingError(f"it is damaged: {error}") from error
