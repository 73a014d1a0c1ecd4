"""Packages that only some data need."""

import importlib
from typing import Any

from fastmeta.data.images import DataError


class MissingPackage(DataError, ImportError):
    """What reads these data is not installed; the text says how to install it."""


def optional(module: str, package: str, what: str) -> Any:
    """The module of a package.

    Raises:
        MissingPackage: it is not installed.

    >>> optional("no_such_module", "no-such-package", "such files")
    Traceback (most recent call last):
    fastmeta.data.readers.optional.MissingPackage: such files are read with no-such-package: pip install no-such-package
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise MissingPackage(f"{what} are read with {package}: pip install {package}") from None
