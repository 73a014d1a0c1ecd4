"""What a module holds: found once, copied for an evaluation, and put back after it."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.problem.random_state import is_generator

# Not searched: parameters, buffers and children are found by themselves; nn.RNNBase renews its list of weights itself.
_OF_EVERY_MODULE = frozenset(nn.Module().__dict__) | {"_flat_weights"}
_HOLD_NOTHING = frozenset({bool, int, float, complex, str, bytes, type(None), torch.Size, torch.dtype, torch.device})
_CHANGEABLE = (dict, list, set, deque)
_RECORDING = "_fastmeta_"  # begins the attributes in which capture_features records, also during an evaluation


class ModuleState:
    """The parameters, buffers and other attributes of a module and of its parts.

    Attributes are searched for tensors, generators and modules, also in dicts, lists and tuples. A module that is found
    there and nowhere else (a teacher in a list, which hides it from ``state_dict``) is a part like the others.

    Args:
        module: the module. Its parts must not be exchanged while this is in use.

    Attributes:
        parts: the module, its submodules, and those that are hidden in attributes.
        frozen: parameters that do not require grad, by their paths.
        generators: generators of random numbers that the parts hold.

    Raises:
        ValueError: a tensor requires grad and is neither a parameter nor computed: no derivative would see it move.
    """

    def __init__(self, module: nn.Module) -> None:
        paths = {part: f"{name}." if name else "" for name, part in module.named_modules()}
        self.parts: list[nn.Module] = list(paths)
        self.generators: list[Any] = []
        self.frozen: dict[str, Tensor] = {}
        # One name of a tied parameter.
        self._names = {id(parameter): name for name, parameter in module.named_parameters()}
        self._containers: list[Any] = []  # each is put back as it was, entry by entry
        self._tensors: list[tuple[Any, Any, Any]] = []  # container, key, and a tensor or a tuple with tensors
        self._seen = {id(part) for part in self.parts}
        for part, path in paths.items():
            self._search(part, path)

    def _search(self, part: nn.Module, path: str) -> None:
        self._containers += [part.__dict__, part._parameters, part._buffers]
        if not isinstance(part, torch.jit.ScriptModule):
            self._containers.append(part._modules)
        for key, parameter in part._parameters.items():
            if parameter is not None and self._holds_tensor(parameter, path + key):
                self._tensors.append((part._parameters, key, parameter))
                if not parameter.requires_grad:
                    self.frozen[path + key] = parameter
        for key, buffer in part._buffers.items():
            if buffer is not None and self._holds_tensor(buffer, path + key):
                self._tensors.append((part._buffers, key, buffer))
        for key in part.__dict__.keys() - _OF_EVERY_MODULE:
            value = part.__dict__[key]
            if type(value) not in _HOLD_NOTHING and not key.startswith(_RECORDING):
                self._search_entry(part.__dict__, key, value, path + key)

    def _search_entry(self, container: Any, key: Any, value: Any, path: str) -> None:
        if self._holds_tensor(value, path) and not isinstance(container, set):
            self._tensors.append((container, key, value))

    def _holds_tensor(self, value: Any, path: str) -> bool:
        """Whether it is a tensor, or a tuple with one; takes up what else it finds."""
        if isinstance(value, Tensor):
            if value.requires_grad and value.is_leaf and id(value) not in self._names:
                raise ValueError(
                    f"model must keep what is trained in its parameters, but {path} {list(value.shape)} requires grad "
                    "and is not among model.named_parameters(); make it an nn.Parameter (in a list: nn.ParameterList, "
                    "nn.ModuleList), or turn its requires_grad off"
                )
            return True
        if isinstance(value, tuple):
            held = [self._holds_tensor(entry, entry_path) for _, entry, entry_path in entries_of(value, path)]
            return any(held)
        if isinstance(value, _CHANGEABLE):
            self._search_container(value, path)
        elif isinstance(value, nn.Module):
            self._take_up(value, path)
        elif is_generator(value) and id(value) not in self._seen:
            self._seen.add(id(value))
            self.generators.append(value)
        return False

    def _search_container(self, container: Any, path: str) -> None:
        if id(container) not in self._seen:
            self._seen.add(id(container))
            self._containers.append(container)
            for key, entry, entry_path in entries_of(container, path):
                self._search_entry(container, key, entry, entry_path)

    def _take_up(self, hidden: nn.Module, path: str) -> None:
        if id(hidden) in self._seen:
            return
        found = list(hidden.named_modules())
        if any(part is self.parts[0] for _, part in found):
            return  # a way back to the module that this one is a part of
        for name, part in found:
            if id(part) not in self._seen:
                self._seen.add(id(part))
                self.parts.append(part)
                self._search(part, f"{path}.{name}." if name else f"{path}.")

    def snapshot(self) -> list[tuple[Any, Any]]:
        """Every container of the state, with its entries as they are now."""
        return [
            # Parameters and buffers of a TorchScript module are no dict and have no copy().
            (container, container.copy() if hasattr(container, "copy") else dict(container.items()))
            for container in self._containers
        ]

    def replace(self, parameters: Mapping[str, Tensor]) -> None:
        """Put in these parameters, by name, and a copy of every other tensor; a tensor in two places stays one.

        Frozen parameters are not copied, but an assignment to their ``.data`` does not reach them. What the module has
        computed from parameters before depends on an ``nn.Parameter`` of its own: no derivative sees it move.
        """
        copies: dict[int, Tensor] = {}
        for container, key, value in self._tensors:
            container[key] = self._replaced(value, parameters, copies)

    def put_back(self, snapshot: Iterable[tuple[Any, Any]]) -> None:
        """Give every container the entries that it had at the snapshot."""
        for container, key, value in self._tensors:
            if isinstance(container, dict):
                container[key] = value  # for nearly all that is all, so that the comparison is quick
        for container, before in snapshot:
            if isinstance(before, dict):
                if len(container) != len(before) or not all(map(is_, container.values(), before.values())):
                    _put_back(container, before)
            elif len(container) != len(before) or not all(map(is_, container, before)):
                container.clear()
                container.update(before) if isinstance(container, set) else container.extend(before)

    def _replaced(self, value: Any, parameters: Mapping[str, Tensor], copies: dict[int, Tensor]) -> Any:
        if isinstance(value, tuple):
            entries = [self._replaced(entry, parameters, copies) for entry in value]
            return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
        if not isinstance(value, Tensor):
            return value
        name = self._names.get(id(value))
        if name is not None and name in parameters:
            return parameters[name]
        if id(value) not in copies:
            copies[id(value)] = _copied(value)
        return copies[id(value)]


def _copied(value: Tensor) -> Tensor:
    if isinstance(value, nn.Parameter):
        # Subclasses, and attributes set on a parameter, are how other libraries quantize.
        plain = type(value) is nn.Parameter and not value.requires_grad and not value.__dict__
        return value.detach() if plain else value
    if not value.requires_grad:
        return value.detach().clone()
    with torch.enable_grad():
        return nn.Parameter(value.detach()).clone()


def _put_back(container: Any, before: dict[Any, Any]) -> None:
    recorded = {key: value for key, value in container.items() if isinstance(key, str) and key.startswith(_RECORDING)}
    before = {**before, **recorded}
    for key in [key for key in container.keys() if key not in before]:  # noqa: SIM118, TorchScript's have no iterator
        del container[key]
    for key, value in before.items():
        if key not in container or container[key] is not value:
            container[key] = value
    if isinstance(container, dict) and list(container) != list(before):  # an entry was deleted and set again
        container.clear()
        container.update(before)


def entries_of(container: Any, path: str) -> Iterator[tuple[Any, Any, str]]:
    """Key, entry and path of what may hold a tensor."""
    of_dict = isinstance(container, dict)
    if _HOLD_NOTHING.issuperset(map(type, container.values() if of_dict else container)):
        return  # of a long list of words, soon
    for key, entry in list(container.items() if of_dict else enumerate(container)):
        if type(entry) not in _HOLD_NOTHING:
            yield key, entry, f"{path}[{key!r}]"
