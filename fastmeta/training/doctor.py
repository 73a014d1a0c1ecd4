"""Which implementation of each operator this installation has, and which derivatives of a user's model are right."""

import contextlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import fastmeta
from fastmeta import _extension, ops
from fastmeta.dispatch import IMPLEMENTATIONS, Operator
from fastmeta.verification import Report


def availability() -> dict[str, dict[str, bool]]:
    """For each public operator, whether each implementation is there.

    >>> availability()["label_gradient"]["reference"]
    True
    """
    found = {}
    for name in ops.__all__:
        module = sys.modules[getattr(ops, name).__module__]
        kernels = [value for value in vars(module).values() if isinstance(value, Operator)]
        if kernels:  # solve_hessian has none of its own: it is made of the others
            found[name] = {
                implementation: all(implementation in kernel.implementations() for kernel in kernels)
                for implementation in IMPLEMENTATIONS
            }
    return found


def reasons() -> list[str]:
    """Why an implementation is missing, one line for each that some operator lacks."""
    known = {
        "cpp": _extension.REASON,
        "cuda": _extension.CUDA_REASON or "feature_similarity and finite_difference_labels are Triton's",
        "triton": _extension.TRITON_REASON or "lists of tensors and tables are CUDA C++",
    }
    found = availability()
    lines = []
    for implementation in IMPLEMENTATIONS:
        missing = [name for name, available in found.items() if not available[implementation]]
        if missing:
            names = "every operator" if len(missing) == len(found) else ", ".join(missing)
            lines.append(f"no {implementation} for {names}: {known[implementation]}")
    return lines


def doctor() -> str:
    """A report for a person."""
    found = availability()
    width = max(map(len, found))
    lines = [f"{'operator'.ljust(width)}  " + "  ".join(IMPLEMENTATIONS)]
    for name, available in found.items():
        marks = [("yes" if available[choice] else "-").ljust(len(choice)) for choice in IMPLEMENTATIONS]
        lines.append(f"{name.ljust(width)}  " + "  ".join(marks).rstrip())
    lines.append("")
    lines.append("solve_hessian: made of hessian_vector_product and torch's linear algebra")
    lines.extend(reasons())
    devices = f"{torch.get_num_threads()} CPU threads"
    if torch.cuda.is_available():
        devices += f", {torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    lines.append(f"torch {torch.__version__}, {devices}")
    info = _extension.build_info()
    if info is not None:
        lines.append(
            "extension: " + ", ".join(f"{key.replace('_', ' ')} {_words(value)}" for key, value in info.items())
        )
    return "\n".join(lines)


def verify_named(name: str) -> Report:
    """:func:`fastmeta.verify` of what a user's function returns; prints its table.

    Args:
        name: ``package.module:function``, with the current folder importable, or ``path/to/file.py:function``. The
            function takes no argument and returns ``(model, inputs)`` or ``(model, inputs, targets)``.

    Raises:
        ValueError: there is no such function, or it takes or returns something else.
        RuntimeError: the user's code raised a ValueError, which is the cause.
    """
    function = _function(name)
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise ValueError(f"model must name a function that takes no argument, got {name!r}: {error}") from error
    with _code_of(name):
        returned = function()
    if not isinstance(returned, tuple) or len(returned) not in (2, 3) or not isinstance(returned[0], torch.nn.Module):
        got = type(returned).__name__
        if isinstance(returned, tuple):
            got = f"({', '.join(type(part).__name__ for part in returned)})"
        raise ValueError(
            f"model must name a function that returns (model, inputs) or (model, inputs, targets), got {got}"
        )
    return fastmeta.verify(*returned)


@contextlib.contextmanager
def _code_of(name: str) -> Iterator[None]:
    """The command line shows a ValueError in one line; one of the user's own code needs its traceback."""
    try:
        yield
    except ValueError as error:
        raise RuntimeError(f"the code of {name} raised {type(error).__name__}: {error}") from error


def _function(name: str) -> Callable[[], Any]:
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise ValueError(f"model must be package.module:function or file.py:function, got {name!r}")
    if place.endswith(".py") and not Path(place).is_file():
        raise ValueError(f"model must name a file that exists, got {place!r}")
    try:
        with _code_of(name):
            module = _file(Path(place)) if place.endswith(".py") else _module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not place.startswith(error.name):
            raise  # the user's module is there, and lacks another
        raise ValueError(f"model must name a module that can be imported from {os.getcwd()}, got {place!r}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"model must name a function of {place}, got {attribute!r}")
    return function


def _module(name: str) -> ModuleType:
    if os.getcwd() not in sys.path:  # as ``python -m`` has it
        sys.path.insert(0, os.getcwd())
    return importlib.import_module(name)


def _file(path: Path) -> ModuleType:
    sys.path.insert(0, str(path.resolve().parent))  # as ``python file.py`` has it
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules.setdefault(path.stem, module)
    specification.loader.exec_module(module)
    return module


def _words(value: object) -> str:
    """A list as its items, those that are rows of a table by their names."""
    if not isinstance(value, list):
        return str(value)
    return " ".join(item[0] if isinstance(item, tuple) else str(item) for item in value) or "-"
