"""Features and logits of the last linear layer, out of any model and with no change to it.

Inside the block the layer's class is a subclass that records its calls. Forward hooks would not do: torch.compile
leaves hooks added after compilation unguarded and runs the old graph, while a module's type is always guarded. The
subclass traces without a graph break; a compiled model is compiled once more for it, and both versions stay cached.
"""

import contextlib
import copyreg
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parameter import is_lazy

from fastmeta.dispatch import in_own_dtype


class Outputs(NamedTuple):
    """One call of the last linear layer, ``logits = features weight^T + bias``."""

    features: Tensor  # [N, D], detached
    logits: Tensor  # [N, C], on the graph
    weight: Tensor  # [C, D], detached
    bias: Tensor | None  # [C], detached


class Head(NamedTuple):
    """Weight and bias of the last linear layer, given to an operator in place of ``logits``.

    The logits ``f = h W^T + b`` are then computed inside: of a large head for some rows at a time.
    """

    weight: Tensor  # [C, D]
    bias: Tensor | None = None  # [C]

    @in_own_dtype
    def logits(self, features: Tensor) -> Tensor:
        """``h W^T + b``. ``[N, C]``."""
        return functional.linear(features, self.weight, self.bias)


class _Call(NamedTuple):
    features: Tensor  # [..., D], detached
    output: Tensor  # [..., C]
    version: int | None  # of the output at the call; None where it cannot be read

    def is_changed(self) -> bool:
        return self.version is not None and self.output._version != self.version


class _Recording:
    """Mixed in front of the layer's own class while a tape is open."""

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)  # type: ignore[misc]
        version = None if torch.compiler.is_compiling() or output.is_inference() else output._version
        # A linked list: torch.compile guards the length of a Python list and would recompile at every call.
        self._fastmeta_calls = (input.detach(), output, version, self._fastmeta_calls)  # type: ignore[has-type]
        return output

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy made in the block, by deepcopy or pickle, has the plain layer's class.
        state = {name: value for name, value in self.__dict__.items() if name != "_fastmeta_calls"}
        return copyreg._reconstructor, (_plain_class(self), object, None), state  # type: ignore[attr-defined]


def _plain_class(layer: object) -> type:
    return type(layer).__mro__[2]


_recording_classes: dict[type, type] = {}


def _recording_class(cls: type) -> type:
    if cls not in _recording_classes:
        _recording_classes[cls] = type(cls.__name__, (_Recording, cls), {"__module__": cls.__module__})
    return _recording_classes[cls]


class FeatureTape:
    """The calls of one linear layer in a :func:`capture_features` block, in order.

    The tape keeps their features and outputs alive as long as it lives.
    """

    def __init__(self, layer: nn.Linear, description: str) -> None:
        self._layer = layer
        self._description = description
        self._before: Any = layer.__dict__.get("_fastmeta_calls")
        self._closed: list[_Call] | None = None

    @property
    def calls(self) -> list[tuple[Tensor, Tensor]]:
        """Features ``[..., D]`` and output ``[..., C]`` of each call so far, in order."""
        return [(call.features, call.output) for call in self._recorded()]

    def outputs(self, logits: Tensor) -> Outputs:
        """The features that gave ``logits``, with the layer's weight and bias as they are now.

        Args:
            logits: what the layer returned ``[N, C]``, or rows of it: a slice, or a part from ``split`` or ``chunk``
                of one concatenated forward; also after a cast to another dtype. Outputs with more dimensions are
                matched row by row by ``logits.flatten(0, -2)``.

        Raises:
            RuntimeError: the layer has not run, or did not give these logits.
            ValueError: ``logits`` is not 2-D, or was changed in place.

        >>> import torch
        >>> layer = torch.nn.Linear(3, 2)
        >>> with capture_features(layer) as tape:
        ...     first, second = layer(torch.arange(15.0).view(5, 3)).split([3, 2])
        >>> tape.outputs(second).features
        tensor([[ 9., 10., 11.],
                [12., 13., 14.]])
        """
        if not isinstance(logits, Tensor):
            raise TypeError(f"logits must be a tensor, got {type(logits).__name__}")
        if logits.dim() != 2:
            hint = "; flatten them first: logits.flatten(0, -2)" if logits.dim() > 2 else ""
            raise ValueError(f"logits must be 2-D [N, C], got {logits.dim()}-D {list(logits.shape)}{hint}")
        calls = self._recorded()
        if not calls:
            raise RuntimeError(f"{self._description} has not run in the capture_features block")
        for call in reversed(calls):
            rows = _rows(logits, call.output)
            if rows is None:
                continue
            if call.is_changed():
                raise ValueError(
                    f"the output of {self._description} was changed in place after the call, so logits are not what "
                    "its features give; use an operation that returns a new tensor"
                )
            features = call.features.flatten(0, -2)[rows]
            bias = None if self._layer.bias is None else self._layer.bias.detach()
            return Outputs(features, logits, self._layer.weight.detach(), bias)
        shapes = ", ".join(str(list(call.output.shape)) for call in calls)
        raise RuntimeError(
            f"logits {list(logits.shape)} are not rows of any output of {self._description} (its calls in the block "
            f"gave {shapes}). Pass what the layer returned, or a slice of it, before anything is computed from it; if "
            "another layer gives the logits, capture that one: capture_features(model.fc)"
        )

    def _recorded(self) -> list[_Call]:
        if self._closed is not None:
            return self._closed
        calls = []
        link = self._layer.__dict__["_fastmeta_calls"]
        while link is not self._before:
            calls.append(_Call(*link[:3]))
            link = link[3]
        return calls[::-1]

    def _close(self) -> None:
        self._closed = self._recorded()
        self._before = None


@contextlib.contextmanager
def capture_features(module: nn.Module) -> Iterator[FeatureTape]:
    """Record what goes into and out of the last linear layer while the block runs.

    Works for a layer anywhere inside a nested, compiled or DistributedDataParallel-wrapped model. A compiled model is
    compiled once more, without a graph break, when it first runs in such a block. Blocks may be nested.

    Args:
        module: the last ``nn.Linear`` itself, or a model; then the ``nn.Linear`` defined last in it.

    Raises:
        TypeError: ``module`` is not a module.
        ValueError: it contains no ``nn.Linear``.
        RuntimeError: the layer did not run in the block.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    >>> with capture_features(model) as tape:
    ...     logits_l, logits_u = model(torch.ones(5, 4)), model(torch.zeros(6, 4))
    >>> tape.outputs(logits_u).features.shape
    torch.Size([6, 3])
    """
    layer, description = last_linear(module)
    outermost = not isinstance(layer, _Recording)
    if outermost:
        # Not by nn.Module.__setattr__: the model's state must not change.
        layer.__dict__["_fastmeta_calls"] = None
        layer.__class__ = _recording_class(type(layer))
    tape = FeatureTape(layer, description)
    try:
        yield tape
    finally:
        tape._close()
        if outermost:
            layer.__class__ = _plain_class(layer)
            del layer.__dict__["_fastmeta_calls"]
    if not tape.calls:
        raise RuntimeError(
            f"{description} did not run in the capture_features block; run the model inside it, or name the layer "
            "that gives the logits: capture_features(model.fc)"
        )


def last_linear(module: object) -> tuple[nn.Linear, str]:
    """The layer, and how to name it in an error."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    if isinstance(module, nn.Linear):
        layer, description = module, f"the layer Linear({module.in_features}, {module.out_features})"
    else:
        found = [(name, child) for name, child in module.named_modules() if isinstance(child, nn.Linear)]
        if not found:
            raise ValueError(f"module must be or contain an nn.Linear, got {type(module).__name__} without one")
        name, layer = found[-1]
        description = f"the layer '{name}' Linear({layer.in_features}, {layer.out_features})"
        if len(found) > 1:
            description += f", the last of {len(found)} nn.Linear in {type(module).__name__}"
    if any(is_lazy(parameter) for parameter in layer.parameters()):
        raise ValueError(f"{description} is lazy; run the model once before capturing it")
    return layer, description


def _rows(logits: Tensor, output: Tensor) -> slice | None:
    """Which rows of ``output [..., C]`` the ``logits [N, C]`` are; None if they are not."""
    if logits is output:
        return slice(None)
    if output.shape[-1] != logits.shape[-1] or not output.is_contiguous():
        return None
    if logits.dtype == output.dtype:
        return _rows_of_view(logits, output)
    if not logits.is_floating_point():
        return None
    cast = logits if logits._base is None else logits._base
    if cast.shape != output.shape or not _is_cast(cast, output):
        return None
    return _rows_of_view(logits, cast)


def _rows_of_view(view: Tensor, whole: Tensor) -> slice | None:
    """Compares storage, offset and stride; no data is read."""
    num_rows, num_columns = view.shape
    if view.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr() or view.device != whole.device:
        return None
    if num_rows == 0 or num_columns == 0:
        return slice(0, num_rows)
    start, column = divmod(int(view.storage_offset() - whole.storage_offset()), num_columns)
    step, rest = divmod(view.stride(0), num_columns) if num_rows > 1 else (1, 0)
    stop = start + step * (num_rows - 1) + 1
    rows = whole.numel() // num_columns
    if column or rest or step < 1 or start < 0 or stop > rows or (num_columns > 1 and view.stride(1) != 1):
        return None
    return slice(start, stop, step)


def _is_cast(cast: Tensor, output: Tensor) -> bool:
    node = cast.grad_fn
    if node is not None and node.name() == "ToCopyBackward0":
        return node.next_functions[0] == (output.grad_fn, output.output_nr)
    # Cast without a graph or inside a compiled one: only the values can tell (on a GPU this waits for the device).
    return cast.device == output.device and torch.equal(cast.detach(), output.detach().to(cast.dtype))
