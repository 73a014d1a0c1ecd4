"""Copies of a model's inputs, so that a model which changes its inputs in place gets the same ones in every pass."""

import copy
import dataclasses
from collections.abc import Iterator, MutableMapping
from typing import Any

from torch import Tensor


class InputCopies:
    """Copies inputs, and finds out whether a model has changed what could not be copied.

    Tensors are copied inside dicts, lists, tuples and dataclasses, and objects with a method ``clone()`` by that (graph
    batches, tensor dicts). Any other object goes to the model itself.

    Args:
        on_graph: whether copies stay on the graph of autograd; else they are detached.
    """

    def __init__(self, *, on_graph: bool) -> None:
        self._on_graph = on_graph
        self._copies: dict[int, Any] = {}  # one tensor in two places stays one
        self._originals: list[tuple[Any, str, Tensor, int]] = []  # owner, attribute, tensor and version

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
        for name, tensor in _tensors_of(value):
            self._originals.append((value, name, tensor, tensor._version))
        return value

    def check_unchanged(self) -> None:
        """Raise ValueError if the model has changed a tensor of an object that could not be copied."""
        for owner, name, tensor, version in self._originals:
            if tensor._version != version or getattr(owner, name) is not tensor:
                kind = type(owner).__name__
                raise ValueError(
                    f"model must not change its inputs in place, but it changed {kind}.{name}; give the tensors in a "
                    f"dict, or {kind} a method clone()"
                )


def _tensors_of(value: Any) -> Iterator[tuple[str, Tensor]]:
    for name, entry in getattr(value, "__dict__", {}).items():
        if isinstance(entry, Tensor) and not entry.is_inference():  # an inference tensor has no version
            yield name, entry
