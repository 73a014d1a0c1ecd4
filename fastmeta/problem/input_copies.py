"""Copies of a model's inputs, so that a model which changes its inputs in place gets the same ones in every pass."""

import copy
import dataclasses
import sys
from collections.abc import Iterator, MutableMapping
from typing import Any

from torch import Tensor

from fastmeta.problem.module_state import entries_of


class InputCopies:
    """Copies inputs, and finds out whether a model has changed what could not be copied.

    Tensors and NumPy arrays are copied inside dicts, lists, tuples and dataclasses, and objects with a method
    ``clone()`` by that (graph batches, tensor dicts). Any other object goes to the model itself.

    Args:
        on_graph: whether copies stay on the graph of autograd; else they are detached.
    """

    def __init__(self, *, on_graph: bool) -> None:
        self._on_graph = on_graph
        self._copies: dict[int, Any] = {}  # one tensor in two places stays one
        # Object, path in it, where the tensor is and under which key, tensor and version.
        self._originals: list[tuple[Any, str, Any, Any, Tensor, int]] = []

    def __call__(self, value: Any) -> Any:
        """A copy of the inputs, or of a part of them."""
        if isinstance(value, (str, bytes, int, float, type(None))):
            return value
        if id(value) not in self._copies:
            self._copies[id(value)] = self._copied(value)
        return self._copies[id(value)]

    def _copied(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return (value if self._on_graph else value.detach()).clone()
        if "numpy" in sys.modules and isinstance(value, sys.modules["numpy"].ndarray):
            return value.copy()
        if isinstance(value, tuple):
            entries = [self(entry) for entry in value]
            return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
        copied: Any
        if isinstance(value, list):
            copied = copy.copy(value)
            copied[:] = [self(entry) for entry in value]
            return copied
        if isinstance(value, MutableMapping):
            copied = copy.copy(value)
            for key, entry in value.items():
                copied[key] = self(entry)
            return copied
        if callable(getattr(value, "clone", None)):
            return value.clone()
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            copied = copy.copy(value)
            for field in dataclasses.fields(value):
                object.__setattr__(copied, field.name, self(getattr(value, field.name)))
            return copied
        if isinstance(value, Iterator):
            raise TypeError(
                f"inputs must be there for several passes, got {type(value).__name__}, an iterator; use a list"
            )
        for container, key, path, tensor in _tensors_of(getattr(value, "__dict__", {}), ""):
            self._originals.append((value, path, container, key, tensor, tensor._version))
        return value

    def check_unchanged(self) -> None:
        """Raise ValueError if the model has changed a tensor of an object that could not be copied."""
        for owner, path, container, key, tensor, version in self._originals:
            there = container.get(key) if isinstance(container, dict) else dict(enumerate(container)).get(key)
            if tensor._version != version or there is not tensor:
                kind = type(owner).__name__
                raise ValueError(
                    f"model must not change its inputs in place, but it changed {kind}{path}; give the tensors in a "
                    f"dict, or {kind} a method clone()"
                )


def _tensors_of(container: Any, path: str) -> Iterator[tuple[Any, Any, str, Tensor]]:
    """The tensors in an object's attributes, and in the dicts, lists and tuples among these."""
    for key, entry, entry_path in entries_of(container, path):
        place = entry_path if path else f".{key}"
        if isinstance(entry, Tensor):
            if not entry.is_inference():  # it has no version
                yield container, key, place, entry
        elif isinstance(entry, (dict, list, tuple)):
            yield from _tensors_of(entry, place)
