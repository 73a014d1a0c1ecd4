"""Packages that only some data need."""

import importlib
from typing import Any


def optional(module: str, package: str, what: str) -> Any:
    """The module, or an error that says what to install.

    Raises:
        ImportError: it is not installed.

    >>> optional("no_such_module", "no-such-package", "such files")
    Traceback (most recent call last):
    ImportError: such files are read with no-such-package, which is not installed: pip install no-such-package
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"{what} are read with {package}, which is not installed: pip install {package}") from error
