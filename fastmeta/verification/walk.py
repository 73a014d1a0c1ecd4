"""The way through a model and what it holds, once, to everything that a pass might change."""

import functools
import random
import sys
import sysconfig
import types
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from fastmeta.verification.saved import PLAIN, SavedGenerator, SavedHolder, SavedTensor, saved

_MOST_OBJECTS = 100_000  # of one snapshot; what lies beyond is not seen
_LIBRARIES = tuple({sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")})
# Places inside a module that say nothing of their own in a name.
_SILENT = {"_parameters", "_buffers", "_modules", "__dict__"}


class Walk:
    """Goes through a model once and collects what :class:`State` keeps."""

    def __init__(self) -> None:
        self.holders: list[SavedHolder] = []
        self.tensors: list[SavedTensor] = []
        self.generators: list[SavedGenerator] = []
        self._seen: dict[int, Any] = {}  # keeps objects alive, so that no id is used twice

    def visit(self, value: Any, name: str, kind: str) -> None:
        """Look at ``value`` and, if it holds others, at those; ``kind`` is the word before its name."""
        if isinstance(value, PLAIN) or id(value) in self._seen or len(self._seen) > _MOST_OBJECTS:
            return
        self._seen[id(value)] = value
        label = f"{kind} {name}".strip() if kind != "inputs" else name
        if isinstance(value, Tensor):
            self.tensors.append(saved(label, value))
            if value.is_leaf and value.grad is not None:
                self._seen[id(value.grad)] = value.grad
        elif isinstance(value, numpy.ndarray):
            self._array(value, label)
        elif isinstance(value, (torch.Generator, random.Random, numpy.random.Generator, numpy.random.RandomState)):
            self._generator(value, label)
        elif isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
            self._function(value, name)
        elif isinstance(value, (dict, list, deque, set)):
            self._container(value, name, kind)
        elif isinstance(value, (tuple, frozenset)) or (isinstance(value, Mapping) and kind == "inputs"):
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            for key, item in items:
                self.visit(item, name if kind == "inputs" else f"{name}[{key}]", kind)
            if kind == "inputs" and hasattr(value, "__dict__"):
                self._attributes(value, name, kind)
        elif isinstance(value, nn.Module) or _is_plain_object(value):
            self._attributes(value, name, kind)

    def _attributes(self, value: Any, name: str, kind: str) -> None:
        holder = value.__dict__

        def place(key: Any) -> tuple[str, str]:
            if kind == "inputs":
                return name, kind
            if isinstance(value, nn.Module) and key in _SILENT:
                return name, {"_parameters": "parameter", "_buffers": "buffer"}.get(key, "attribute")
            if isinstance(value, nn.Module) and key == "training":
                return f"of {name or 'the model'}", "mode"
            return f"{name}.{key}".lstrip("."), "attribute" if kind in ("parameter", "buffer") else kind

        own = type(value).__module__.startswith("torch.nn")

        def label(key: Any) -> str:
            if own and key.startswith("_") and key not in _SILENT:
                return ""  # a cache of torch's own layers
            return name if kind == "inputs" else " ".join(place(key)[::-1])

        self._hold(holder, label)
        for key, item in list(holder.items()):
            self.visit(item, *place(key))
        for cls in type(value).__mro__:
            if id(cls) not in self._seen and not _is_library(cls.__module__):
                self._class(cls)

    def _class(self, cls: type) -> None:
        self._seen[id(cls)] = cls
        values = {key: item for key, item in cls.__dict__.items() if not key.startswith("__")}
        plain = [key for key, item in values.items() if not callable(item) and not hasattr(item, "__get__")]

        def read() -> dict[Any, Any]:
            return {key: cls.__dict__[key] for key in plain if key in cls.__dict__}

        def write(saved: dict[Any, Any]) -> None:
            for key, item in saved.items():
                setattr(cls, key, item)

        self.holders.append(SavedHolder(lambda key: f"class attribute {cls.__name__}.{key}", read, write))
        for key in plain:
            self.visit(values[key], f"{cls.__name__}.{key}", "class attribute")
        for item in values.values():
            function = getattr(item, "__func__", getattr(item, "fget", item))
            if isinstance(function, types.FunctionType):
                self.visit(function, "", "closure")

    def _container(self, value: Any, name: str, kind: str) -> None:
        if isinstance(value, dict):
            self._hold(value, lambda key: _entry(name, kind, key))
            items: list[tuple[Any, Any]] = list(value.items())
        else:

            def write(saved: dict[Any, Any]) -> None:
                value.clear()
                value.update(saved.values()) if isinstance(value, set) else value.extend(saved.values())

            label = name if kind == "inputs" else f"{kind} {name}"
            if isinstance(value, set):
                self.holders.append(SavedHolder(lambda key: label, lambda: {item: item for item in value}, write))
            else:
                self.holders.append(SavedHolder(lambda key: label, lambda: dict(enumerate(value)), write))
            items = list(enumerate(value))
        inside = name in ("", *_SILENT) or kind in ("parameter", "buffer")
        for key, item in items:
            if kind == "inputs":
                self.visit(item, name, kind)
            elif isinstance(item, nn.Module) or inside:
                self.visit(item, f"{name}.{key}".lstrip("."), kind)
            else:
                self.visit(item, f"{name}[{key!r}]", kind)

    def _hold(self, holder: dict[Any, Any], name: Callable[[Any], str]) -> None:
        def write(saved: dict[Any, Any]) -> None:
            for key in [key for key in holder if key not in saved]:
                del holder[key]
            holder.update(saved)

        self.holders.append(SavedHolder(name, lambda: dict(holder), write))

    def _array(self, value: Any, name: str) -> None:
        if value.dtype != object:
            self.generators.append(
                SavedGenerator(name, value.copy, lambda saved: numpy.copyto(value, saved), value.copy())
            )

    def _generator(self, value: Any, name: str) -> None:
        read: Callable[[], Any]
        write: Callable[[Any], Any]
        if isinstance(value, numpy.random.Generator):
            bits: Any = value.bit_generator
            read, write = (lambda: bits.state), (lambda saved: setattr(bits, "state", saved))
        elif isinstance(value, random.Random):
            read, write = value.getstate, value.setstate
        else:
            read, write = value.get_state, value.set_state
        self.generators.append(SavedGenerator(name, read, write, read()))

    def _function(self, value: Any, name: str) -> None:
        if isinstance(value, functools.partial):
            for part in (value.func, value.args, value.keywords):
                self.visit(part, name, "closure")
            return
        if isinstance(value, types.MethodType):
            self.visit(value.__self__, name, "closure")
            value = value.__func__
            if not isinstance(value, types.FunctionType):
                return
        for variable, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            self._cell(cell, f"{variable} of {value.__qualname__}")
        for default in [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]:
            self.visit(default, f"default of {value.__qualname__}", "closure")
        if not _is_library(value.__module__):
            self._globals(value)

    def _cell(self, cell: Any, name: str) -> None:
        def read() -> dict[Any, Any]:
            try:
                return {name: cell.cell_contents}
            except ValueError:  # not assigned yet
                return {}

        def write(saved: dict[Any, Any]) -> None:
            cell.cell_contents = saved[name]

        self.holders.append(SavedHolder(lambda key: f"closure {name}", read, write))
        for item in read().values():
            self.visit(item, name, "closure")

    def _globals(self, function: types.FunctionType) -> None:
        """The globals that the function's code names, and the attributes that it may read of the user's modules."""
        names = sorted(_names(function.__code__))
        spaces: list[tuple[str, dict[str, Any]]] = [("", function.__globals__)]
        for name in names:
            module = function.__globals__.get(name)
            if isinstance(module, types.ModuleType) and not _is_library(module.__name__):
                spaces.append((f"{name}.", module.__dict__))
        for prefix, space in spaces:
            found = {name: space[name] for name in names if name in space}
            found = {name: item for name, item in found.items() if not isinstance(item, (types.ModuleType, type))}
            self._some(space, list(found), prefix)
            for name, item in found.items():
                self.visit(item, prefix + name, "global")

    def _some(self, space: dict[str, Any], names: list[str], prefix: str) -> None:
        def read() -> dict[Any, Any]:
            return {name: space[name] for name in names if name in space}

        self.holders.append(SavedHolder(lambda key: f"global {prefix}{key}", read, space.update))


def _entry(name: str, kind: str, key: Any) -> str:
    if kind == "inputs":
        return name
    if kind in ("parameter", "buffer") or name == "":
        return f"{kind} {name}.{key}".replace(" .", " ")
    return f"{kind} {name}[{key!r}]"


def _names(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
    return names


@functools.cache
def _is_library(module: str | None) -> bool:
    """Whether a module is installed, or Python's own: its globals are no part of the user's model."""
    root = (module or "").partition(".")[0]
    if root in sys.stdlib_module_names or root in ("torch", "numpy", "fastmeta"):
        return root != "__main__"
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    return file is not None and file.startswith(_LIBRARIES)


def _is_plain_object(value: Any) -> bool:
    return (
        hasattr(value, "__dict__")
        and isinstance(value.__dict__, dict)
        and not isinstance(value, (type, types.ModuleType, types.BuiltinFunctionType))
        and type(value).__module__.partition(".")[0] not in (*sys.stdlib_module_names - {"__main__"}, "torch", "numpy")
    )
