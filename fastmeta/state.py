"""Modules with state: buffers that keep their dtype, and a state that is taken over whole or not at all."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastmeta import checks

_MODULE = frozenset(vars(nn.Module()))


class Number:
    """A number of a module that may be changed at any time, and is checked whenever it is set.

    It has no ``__get__``: Python then reads the attribute at no cost.

    Args:
        low: the least value; None: any.
        high: the greatest value; None: any.
    """

    def __init__(self, low: float | None = 0.0, high: float | None = None) -> None:
        self._low, self._high = low, high

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    if TYPE_CHECKING:

        def __get__(self, module: object, owner: type) -> float: ...

    def __set__(self, module: nn.Module, value: float) -> None:
        vars(module)[self._name] = checks.number(value, self._name, low=self._low, high=self._high)


class PartNumber:
    """A :class:`Number` of a part, or of what the part is a rule ``of``, as one of the module's own.

    Args:
        part: name of the part.
        name: of the part's number.
    """

    def __init__(self, part: str, name: str) -> None:
        self._part, self._name = part, name

    def __get__(self, module: Any, owner: type) -> Any:
        return self if module is None else getattr(self._holder(module), self._name)

    def __set__(self, module: nn.Module, value: float) -> None:
        setattr(self._holder(module), self._name, value)

    def _holder(self, module: nn.Module) -> object:
        holder = getattr(module, self._part)
        while not hasattr(holder, self._name):
            if not hasattr(holder, "of"):
                raise AttributeError(f"a {type(module).__name__} with these options has no {self._name}")
            holder = holder.of
        return holder


class Stateful(nn.Module):
    """A module without parameters, whose buffers are its state.

    ``to``, ``half`` and the like move the buffers to another device and never change their dtype: a table in bfloat16
    would lose its steps. A state that does not fit is refused by a ValueError before any tensor of the module, or of
    its parts, has changed; so it is where an enclosing module loads it. A state of the enclosing module that has no
    entry of this module at all is left to ``strict``.
    """

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take over a ``state_dict``; what follows is then bit for bit what would have followed it.

        Args:
            state_dict: of a module made with the same arguments.
            strict: False takes an empty state, too, which changes nothing; one that fits in part is refused.
            assign: must be False: the state is copied.

        Raises:
            ValueError: an entry is missing, unexpected or of another shape.
        """
        if assign:
            raise ValueError("assign must be False: a state is copied into the module's own tensors")
        if strict or state_dict:
            self.check_state(state_dict, "")
        return super().load_state_dict(state_dict, strict)

    def check_state(self, state: Mapping[str, Any], prefix: str) -> None:
        """Raise unless the entries that start with ``prefix`` are exactly a state of this module and its parts.

        Raises:
            ValueError: an entry is missing, unexpected or of another shape.
        """
        taken: set[str] = set()
        for path, module in reversed(list(self.named_modules())):  # a part before those that look into it
            place = f"{prefix}{path}." if path else prefix
            own, name = _below(state, place), type(self).__name__
            for key, tensor in {**module._buffers, **module._parameters}.items():
                if tensor is not None and key not in module._non_persistent_buffers_set:
                    entry(own, key, tensor.shape, name, place)
                    taken.add(place + key)
            if isinstance(module, Stateful):
                try:
                    taken.update(place + key for key in module.check_entries(own))
                except ValueError as error:
                    raise ValueError(f"{place[:-1]}: {error}" if place else str(error)) from None
        unexpected = [key for key in state if key.startswith(prefix) and key not in taken]
        if unexpected:
            raise ValueError(f"state must be that of {type(self).__name__}, which has no {', '.join(unexpected)}")

    def entries(self) -> dict[str, Tensor]:
        """What this module itself saves beside its persistent buffers."""
        return {}

    def check_entries(self, state: Mapping[str, Any]) -> Iterable[str]:
        """The names of those of :meth:`entries` that a state of this module has; raise unless they fit."""
        return ()

    def load_entries(self, entries: Mapping[str, Tensor]) -> None:
        """Take over :meth:`entries` that have been checked."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._buffers:
            if not keep_vars and prefix + name in destination:
                # Steps work in place: what was saved must not move on with them.
                destination[prefix + name] = destination[prefix + name].clone()
        destination.update({prefix + name: tensor for name, tensor in self.entries().items()})

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str], *rest: Any
    ) -> None:
        own = _below(state_dict, prefix)
        if own:
            self.check_state(state_dict, prefix)
            names = list(self.check_entries(own))
            self.load_entries({name: own[name] for name in names})
            state_dict = {prefix + name: value for name, value in own.items() if name not in names}
        else:
            missing_keys.extend(prefix + name for name in self.entries())
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *rest)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        group = vars(self).get("process_group")
        memo[id(group)] = group  # it cannot be copied: the copy works in the same one
        copied = memo[id(self)] = type(self).__new__(type(self))
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(lambda tensor: self.keep_dtype(fn, tensor), recurse)

    @staticmethod
    def keep_dtype(move: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
        """The tensor where ``move`` has brought it."""
        moved = move(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    def extra_repr(self) -> str:
        """The settings."""
        return ", ".join(f"{name}={value!r}" for name, value in settings(self))


class TensorList(Stateful):
    """A list of buffers, whose number and shapes the first step, or a loaded state, decides.

    >>> averages = TensorList()
    >>> averages.replace([torch.zeros(2), torch.zeros(3, 2)])
    >>> [tuple(average.shape) for average in averages], list(averages.state_dict())
    ([(2,), (3, 2)], ['count', '0', '1'])
    """

    def replace(self, tensors: Sequence[Tensor]) -> None:
        """Other tensors in place of these."""
        self._buffers.clear()
        for place, tensor in enumerate(tensors):
            self.register_buffer(str(place), tensor, persistent=False)  # entries() saves them

    def __iter__(self) -> Iterator[Tensor]:
        return iter(list(self._buffers.values()))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self._buffers)

    def entries(self) -> dict[str, Tensor]:
        """The tensors, and their number: one that has lost some is told from one of before the first step."""
        tensors = {str(place): tensor.clone() for place, tensor in enumerate(self)}
        return {"count": torch.tensor(len(self)), **tensors}

    def check_entries(self, state: Mapping[str, Any]) -> list[str]:
        """See :meth:`Stateful.check_entries`."""
        count = int(entry(state, "count", (), type(self).__name__))
        names = [str(place) for place in range(count)]
        for name in names:
            entry(state, name, None, type(self).__name__)
        return ["count", *names]

    def load_entries(self, entries: Mapping[str, Tensor]) -> None:
        """Into the tensors that are there, where they have these shapes."""
        _, *names = self.check_entries(entries)
        own, loaded = list(self), [entries[name].detach() for name in names]
        if [tensor.shape for tensor in own] != [tensor.shape for tensor in loaded]:
            self.replace([tensor.clone() for tensor in loaded])
            return
        for mine, other in zip(own, loaded, strict=True):
            mine.copy_(other)

    def extra_repr(self) -> str:
        """The shapes."""
        return ", ".join(str(list(tensor.shape)) for tensor in self)


def settings(module: nn.Module) -> list[tuple[str, Any]]:
    """Public attributes of a module that are neither tensors nor modules, by name."""
    found = ((name, value) for name, value in vars(module).items() if name not in _MODULE)
    return [(name, value) for name, value in found if not name.startswith("_")]


def parts(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Everything that a module holds by name: modules, buffers, parameters and attributes of its own."""
    for held in (module._modules, module._buffers, module._parameters):
        yield from held.items()
    yield from ((name, value) for name, value in vars(module).items() if name not in _MODULE)


def entry(state: Mapping[str, Any], key: str, shape: Sequence[int] | None, name: str, prefix: str = "") -> Tensor:
    """The tensor of a state under this key.

    Args:
        state: see :meth:`Stateful.load_state_dict`.
        key: of the entry.
        shape: that it must have; None: any.
        name: of the class, for the error.
        prefix: of all keys of the state, for the error.

    Raises:
        ValueError: it is missing, no tensor or of another shape.
    """
    found = state.get(key)
    if not isinstance(found, Tensor):
        raise ValueError(f"state must have a tensor {prefix + key!r} for {name}, got {sorted(state)}")
    if shape is not None and found.shape != tuple(shape):
        raise ValueError(f"{prefix}{key} must be {list(shape)} like that of {name}, got {list(found.shape)}")
    return found


def _below(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
