"""Everything that can be seen of a model and its inputs at one moment: to be compared, and put back.

The derivatives of the package put back parameters, buffers, modes and random states. This looks further, so that it can
tell whether they do and whether it is enough: plain attributes, containers and objects inside of modules, attributes of
their classes, closures of functions, and the globals that the user's own code reads.
"""

import functools
import random
import sys
import sysconfig
import types
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor, nn

_MOST_OBJECTS = 100_000  # of one snapshot; what lies beyond is not seen
_PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_LIBRARIES = tuple({sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")})
_TABLES = {"_parameters": "parameter", "_buffers": "buffer", "_modules": None}  # of a module, with their words
_MISSING = object()

Entries = dict[Any, Any]
Found = tuple[str, Any]  # a name and what has it


def is_identical(now: Any, before: Any) -> bool:
    """The very same, or an equal number or string."""
    return now is before or (isinstance(now, _PLAIN) and is_equal(now, before))


def is_equal(now: Any, before: Any) -> bool:
    """Equal in everything, NaN included; an object or parameter only to itself."""
    if now is before:
        return True
    if type(now) is not type(before) or isinstance(now, nn.Parameter):
        return False
    if isinstance(now, Tensor):
        kinds = [(tensor.shape, tensor.dtype, tensor.device, _has_values(tensor)) for tensor in (now, before)]
        if kinds[0] != kinds[1] or not _has_values(now):
            return False
        return torch.equal(now, before) or torch.allclose(now, before, rtol=0, atol=0, equal_nan=True)
    if isinstance(now, numpy.ndarray):
        return now.dtype == before.dtype and numpy.array_equal(now, before, equal_nan=now.dtype.kind in "fc")
    if isinstance(now, dict):
        return now.keys() == before.keys() and all(is_equal(now[key], before[key]) for key in now)
    if isinstance(now, (list, tuple)):
        return len(now) == len(before) and all(map(is_equal, now, before))
    if isinstance(now, weakref.ref):
        return now() is before()
    return isinstance(now, _PLAIN) and bool(now == before or (now != now and before != before))


@dataclass
class Saved:
    """The entries of one object: what they were, which of them have changed, and the way back."""

    label: Callable[[Any], str]  # name of the entry with a key, after a word that says what it is
    read: Callable[[], Entries]
    write: Callable[[Entries], Any]
    same: Callable[[Any, Any], bool] = is_equal  # whether the report takes an entry for unchanged
    is_copy: bool = False  # whether what is read is a copy, with nothing inside to look at
    name: str = ""  # in the report, of a container that has no names for its entries
    before: Entries = field(init=False)

    def __post_init__(self) -> None:
        self.before = self.read()

    def found(self) -> list[Found]:
        """What there is to look at inside."""
        return [] if self.is_copy else [(self.label(key), value) for key, value in self.before.items()]

    def changed(self) -> list[str]:
        """Names of the entries that are not as they were."""
        return [self.name or self.label(key) for key in self._differing(self.same)]

    def restore(self) -> None:
        """Put every entry back."""
        if self._differing(is_equal if self.is_copy else is_identical):
            self.write(self.before)

    def _differing(self, same: Callable[[Any, Any], bool]) -> list[Any]:
        before, now = self.before, self.read()
        return [key for key in {**before, **now} if not same(now.get(key, _MISSING), before.get(key, _MISSING))]


class Snapshot:
    """A snapshot of a model, its inputs and every random state.

    Args:
        model: the module.
        inputs: what it is called with.

    >>> model, x = nn.Linear(2, 1), torch.zeros(3, 2)
    >>> snapshot = Snapshot(model, x)
    >>> with torch.no_grad():
    ...     _ = model.weight.add_(1), x.fill_(2)
    >>> snapshot.changed()
    ['parameter weight', 'inputs']
    >>> snapshot.restore()
    >>> snapshot.changed(), x.sum()
    ([], tensor(0.))
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.tensors: dict[int, tuple[str, Tensor]] = {}  # all that were seen, with their names, by id
        self._saved = list(_random_states())
        seen: dict[int, Any] = {}  # keeps objects alive, so that no id is used twice
        todo: list[Found] = [("inputs", inputs), ("attribute ", model)]
        while todo and len(seen) < _MOST_OBJECTS:
            label, value = todo.pop()
            if isinstance(value, _PLAIN) or id(value) in seen:
                continue
            seen[id(value)] = value
            if isinstance(value, Tensor):
                self.tensors[id(value)] = label, value
            if isinstance(value, nn.Module):  # its tables have words of their own
                seen.update({id(vars(value).get(table)): vars(value).get(table) for table in _TABLES})
            parts = list(_parts(value, label))
            self._saved += parts
            todo += reversed([found for part in parts for found in part.found()])

    def changed(self) -> list[str]:
        """Names of what is not as it was; an equal tensor or container in place of another is no change."""
        return list(dict.fromkeys(name for saved in self._saved for name in saved.changed()))

    def restore(self) -> None:
        """Put everything back."""
        for saved in self._saved:
            saved.restore()


def is_promised(name: str) -> bool:
    """Whether the package promises to leave this as it was, whatever the model does with it."""
    return not name.startswith(("attribute ", "global ", "closure ", "class attribute "))


def _parts(value: Any, label: str) -> Iterator[Saved]:
    """What an object consists of."""
    if isinstance(value, Tensor):
        yield from _of_tensor(value, label)
    elif isinstance(value, numpy.ndarray) and value.dtype != object:
        yield _whole(label, value.copy, lambda before: numpy.copyto(value, before))
    elif isinstance(value, numpy.random.Generator):
        bits: Any = value.bit_generator
        yield _whole(label, lambda: bits.state, lambda before: setattr(bits, "state", before))
    elif isinstance(value, random.Random):
        yield _whole(label, value.getstate, value.setstate)
    elif isinstance(value, (torch.Generator, numpy.random.RandomState)):
        yield _whole(label, value.get_state, value.set_state)
    elif isinstance(value, functools.partial):
        yield _fixed(label, value.func, *value.args, *value.keywords.values())
    elif isinstance(value, types.MethodType):
        yield _fixed(label, value.__self__, value.__func__)
    elif isinstance(value, types.FunctionType):
        yield from _of_function(value)
    elif isinstance(value, type):
        yield from _of_class(value)
    elif isinstance(value, dict):
        yield _entries(value, lambda key: f"{label}[{key!r}]")
    elif isinstance(value, (list, deque, set)):
        yield _of_container(value, label)
    elif isinstance(value, (tuple, frozenset)):
        yield from (_fixed(f"{label}[{index}]", item) for index, item in enumerate(value))
    elif isinstance(value, torch.jit.ScriptModule):  # its other attributes are made anew when they are read
        yield from (_fixed(f"{label}.{name}", item) for name, item in value.state_dict(keep_vars=True).items())
    elif isinstance(value, nn.Module) or _is_plain_object(value):
        yield from _of_object(value, label)
    elif isinstance(value, Mapping) and label.startswith("inputs"):
        yield from (_fixed(f"{label}[{key!r}]", item) for key, item in value.items())


def _whole(label: str, read: Callable[[], Any], write: Callable[[Any], Any]) -> Saved:
    """A single value, of which reading makes a copy."""
    return Saved(lambda key: label, lambda: {"": read()}, lambda before: write(before[""]), is_copy=True)


def _fixed(label: str, *inside: Any) -> Saved:
    """What cannot change, and holds what can."""
    return Saved(lambda key: label, lambda: dict(enumerate(inside)), lambda before: None)


def _entries(owner: Entries, label: Callable[[Any], str], keys: Collection[Any] | None = None) -> Saved:
    """Of a dictionary; under some keys alone."""

    def read() -> Entries:
        return dict(owner) if keys is None else {key: owner[key] for key in keys if key in owner}

    def write(before: Entries) -> None:
        for key in read().keys() - before.keys():
            del owner[key]
        owner.update(before)

    return Saved(label, read, write)


def _attribute(owner: Any, name: str, label: str) -> Saved:
    return Saved(lambda key: label, lambda: {"": getattr(owner, name)}, lambda before: setattr(owner, name, before[""]))


def _of_container(value: Any, label: str) -> Saved:
    is_set = isinstance(value, set)

    def read() -> Entries:
        return {item: item for item in value} if is_set else dict(enumerate(value))

    def write(before: Entries) -> None:
        value.clear()
        (value.update if is_set else value.extend)(before.values())

    return Saved(lambda key: f"{label}[{key!r}]", read, write, name=label)


def _of_tensor(tensor: Tensor, label: str) -> Iterator[Saved]:
    """Its values and, of a leaf, its flag and its gradient."""

    def write(before: Tensor) -> None:
        if tensor.shape == before.shape:
            tensor.data.copy_(before)
        else:
            tensor.data = before.clone()

    def read_leaf() -> Entries:
        return {"requires_grad": tensor.requires_grad, "grad": tensor.grad}

    def write_leaf(before: Entries) -> None:
        if not tensor.is_leaf and not tensor._is_view():
            tensor.detach_()
        if tensor.is_leaf:
            tensor.requires_grad, tensor.grad = before.values()

    if tensor.is_leaf:
        yield Saved(lambda key: label, read_leaf, write_leaf, same=is_identical)
    if _has_values(tensor):
        yield _whole(label, lambda: tensor.detach().clone(), write)


def _of_object(value: Any, label: str) -> Iterator[Saved]:
    """Its attributes, its classes and, of a module, its tables."""
    word, _, name = label.partition(" ")
    prefix = f"{label}." if name or not label.endswith(" ") else label

    def attribute(key: str) -> str:
        if isinstance(value, nn.Module) and key == "training":
            return f"mode of {name or 'the model'}"
        return prefix + key

    for table, kind in _TABLES.items() if isinstance(value, nn.Module) else ():
        yield _entries(vars(value)[table], f"{kind or word}{prefix[len(word) :]}".__add__)
    yield _entries(vars(value), attribute)
    yield _fixed("", *(cls for cls in type(value).__mro__ if not _is_library(cls.__module__)))


def _of_class(cls: type) -> Iterator[Saved]:
    """Its attributes that are no functions, and those that are."""
    for key, item in vars(cls).items():
        function = getattr(item, "__func__", getattr(item, "fget", item))
        if isinstance(function, types.FunctionType):
            yield _fixed("", function)
        elif not (key.startswith("__") or callable(function) or hasattr(function, "__get__")):
            yield _attribute(cls, key, f"class attribute {cls.__name__}.{key}")


def _of_function(function: types.FunctionType) -> Iterator[Saved]:
    """Its closure, its defaults, and the globals that its code names, here and in the user's modules."""
    code, own = function.__code__, function.__qualname__
    for variable, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        if cell != types.CellType():  # of an empty one nothing can be read
            yield _attribute(cell, "cell_contents", f"closure {variable} of {own}")
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    yield _fixed(f"closure default of {own}", *defaults)
    names = sorted(_names(code))
    modules = {f"{name}.": function.__globals__.get(name) for name in names}
    spaces = {prefix: vars(module) for prefix, module in modules.items() if isinstance(module, types.ModuleType)}
    for prefix, space in {"": function.__globals__, **spaces}.items():
        if not _is_library(space.get("__name__")):
            keys = [name for name in names if not isinstance(space.get(name), (types.ModuleType, type))]
            yield _entries(space, f"global {prefix}".__add__, keys)


def _random_states() -> Iterator[Saved]:
    yield _whole("random state of torch", torch.get_rng_state, torch.set_rng_state)
    yield _whole("random state of Python", random.getstate, random.setstate)
    yield _whole("random state of NumPy", numpy.random.get_state, numpy.random.set_state)
    if torch.cuda.is_initialized():
        yield _whole("random state of CUDA", torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all)


def _has_values(tensor: Tensor) -> bool:
    """Whether they can be copied and compared."""
    return tensor.layout == torch.strided and not (tensor.is_nested or tensor.is_quantized or tensor.is_meta)


def _names(code: types.CodeType) -> set[str]:
    """Of globals and attributes that the code reads, with that of the functions inside."""
    inside = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*map(_names, inside))


@functools.cache
def _is_library(module: str | None) -> bool:
    """Whether a module is installed, or Python's own: its globals are no part of the user's model."""
    root = (module or "").partition(".")[0]
    if root in sys.stdlib_module_names or root in ("torch", "numpy", "fastmeta"):
        return root != "__main__"
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    return file is not None and file.startswith(_LIBRARIES)


def _is_plain_object(value: Any) -> bool:
    root = type(value).__module__.partition(".")[0]
    return (
        isinstance(getattr(value, "__dict__", None), dict)
        and not isinstance(value, (type, types.ModuleType))
        and (root == "__main__" or root not in (*sys.stdlib_module_names, "torch", "numpy"))
    )
