"""A linear layer that records its calls.

While it does, the layer's class is a subclass of its own. Forward hooks would not do: torch.compile leaves hooks added
after compilation unguarded and runs the old graph, while a module's type is always guarded. The subclass traces
without a graph break; a compiled model is compiled once more for it, and both versions stay cached.
"""

import contextlib
import copy
import copyreg
import types
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

_LINEAR_FORWARD = nn.Linear.forward
# In the layer's __dict__, and not set by nn.Module.__setattr__: the model's state must not change.
_CALLS, _REPLICAS, _PATCHED = "_fastmeta_calls", "_fastmeta_replicas", "_fastmeta_patched"


class Call(NamedTuple):
    """One call of the layer."""

    features: Tensor  # [..., D], detached
    output: Tensor  # [..., C]
    weight: Tensor | None  # [C, D], that the call used; None where only a forward of the layer's own knows it
    bias: Tensor | None  # [C], that the call used
    version: int | None  # of the output at the call; None where it cannot be read
    features_version: int | None  # of the features
    is_linear: bool  # the output is features weight^T + bias by nn.Linear's own forward

    def is_changed(self) -> bool:
        """Whether the output was changed in place since."""
        return self.version is not None and self.output._version != self.version

    def has_other_features(self) -> bool:
        """Whether the features were changed in place since, as in a buffer that is used again."""
        return self.features_version is not None and self.features._version != self.features_version


class _Recording:
    """Mixed in front of the layer's own class while it records."""

    _fastmeta_plain: type
    __dict__: dict[str, Any]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A copy made in the block is of the plain layer. Parametrized layers have a __deepcopy__ of their own, too.
        with _as_before(self):
            return copy.deepcopy(self, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        with _as_before(self):
            reduced = self.__reduce_ex__(protocol)
            if reduced[0] is not copyreg.__newobj__ or not isinstance(reduced[2], dict):  # type: ignore[attr-defined]
                return reduced
            # pickle takes __newobj__ only with the class that the layer has now.
            made = copyreg._reconstructor, (type(self), object, None)  # type: ignore[attr-defined]
            return *made, dict(reduced[2]), *reduced[3:]

    def _replicate_for_data_parallel(self) -> Any:
        # nn.DataParallel runs copies of the layer, each in a thread.
        replica = super()._replicate_for_data_parallel()  # type: ignore[misc]
        replica.__dict__[_CALLS] = None
        self.__dict__[_REPLICAS].append(replica)
        return replica


class _RecordingLinear(_Recording):
    """Of a layer with nn.Linear's own forward."""

    def forward(self, input: Tensor) -> Tensor:
        # Read once, as nn.Linear does: reading the weight of a layer under spectral_norm moves its state.
        weight, bias = self.weight, self.bias  # type: ignore[attr-defined]
        output = functional.linear(input, weight, bias)
        # A linked list: torch.compile guards the length of a Python list and would recompile at every call.
        versions, before = (_version(output), _version(input)), self._fastmeta_calls  # type: ignore[has-type]
        self._fastmeta_calls = (input.detach(), output, weight, bias, *versions, True, before)
        return output


class _RecordingOther(_Recording):
    """Of a layer with a forward of its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        result = super().forward(*args, **kwargs)  # type: ignore[misc]
        _record(self, args, kwargs, result)
        return result


def _record(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    features, output = _first_tensor((kwargs.get("input"), args, kwargs)), _first_tensor(result)
    if features is not None and output is not None:
        weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
        versions = _version(output), _version(features)
        layer._fastmeta_calls = (features.detach(), output, weight, bias, *versions, False, layer._fastmeta_calls)


def _version(tensor: Tensor) -> int | None:
    """It counts changes in place."""
    return None if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def _first_tensor(value: Any) -> Tensor | None:
    """The tensor itself, ``logits`` of an object or dict, or the first in a collection."""
    if isinstance(value, Tensor) or value is None:
        return value
    logits = value.get("logits") if isinstance(value, Mapping) else getattr(value, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return next((found for found in map(_first_tensor, parts) if found is not None), None)


_classes: dict[tuple[type, object], type] = {}


def _recording_class(cls: type) -> type:
    key = cls, cls.forward  # type: ignore[attr-defined]
    if key not in _classes:
        mixed_in = _RecordingLinear if key[1] is _LINEAR_FORWARD else _RecordingOther
        _classes[key] = type(cls.__name__, (mixed_in, cls), {"__module__": cls.__module__, "_fastmeta_plain": cls})
    return _classes[key]


def is_recording(layer: nn.Module) -> bool:
    """Whether an enclosing block records the layer already."""
    return isinstance(layer, _Recording)


def forward_name(layer: nn.Module) -> str | None:
    """The forward that runs in place of nn.Linear's, in words; None where there is no other."""
    if "forward" in layer.__dict__:
        return "a forward set on the layer itself (as hooks of other libraries do)"
    cls = type(layer)
    plain = getattr(cls, "_fastmeta_plain", cls)
    return None if plain.forward is _LINEAR_FORWARD else f"the forward of {plain.__name__}"


def start(layer: Any) -> None:
    """From now on the layer records its calls."""
    own = layer.__dict__
    own[_CALLS], own[_REPLICAS] = None, []
    if "forward" in own:
        # It hides the class's forward.
        theirs = own[_PATCHED] = own["forward"]
        is_bound = getattr(theirs, "__func__", None) is _LINEAR_FORWARD and theirs.__self__ is layer
        own["forward"] = types.MethodType(_RecordingLinear.forward if is_bound else _patched_forward, layer)
    layer.__class__ = _recording_class(type(layer))


def _patched_forward(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of a forward that others have set on the layer. No closure: torch.compile would compile each anew."""
    result = layer._fastmeta_patched(*args, **kwargs)
    _record(layer, args, kwargs, result)
    return result


def stop(layer: Any) -> None:
    """The layer is as it was."""
    own = layer.__dict__
    if _PATCHED in own:
        theirs = own.pop(_PATCHED)
        if getattr(own.get("forward"), "__func__", None) in (_patched_forward, _RecordingLinear.forward):
            own["forward"] = theirs
    del own[_CALLS], own[_REPLICAS]
    layer.__class__ = layer._fastmeta_plain


@contextlib.contextmanager
def _as_before(layer: Any) -> Iterator[None]:
    """In the block the layer is as it was before it recorded."""
    recording, own = type(layer), dict(layer.__dict__)
    stop(layer)
    try:
        yield
    finally:
        layer.__class__ = recording
        layer.__dict__.update(own)


class Position(NamedTuple):
    """A place in the calls of a layer."""

    last: Any
    num_replicas: int


def position(layer: nn.Module) -> Position:
    """After the calls so far."""
    own = layer.__dict__
    return Position(own.get(_CALLS), len(own.get(_REPLICAS, ())))


def calls_since(layer: nn.Module, before: Position) -> list[Call]:
    """In order; those of replicas after the layer's own."""
    calls = _unlinked(layer, before.last)
    for replica in layer.__dict__[_REPLICAS][before.num_replicas :]:
        calls += _unlinked(replica, None)
    return calls


def _unlinked(layer: nn.Module, before: Any) -> list[Call]:
    link, calls = layer.__dict__[_CALLS], []
    while link is not before:
        calls.append(Call(*link[:-1]))
        link = link[-1]
    return calls[::-1]
