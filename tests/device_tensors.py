"""CPU tensors that say they are on a GPU, and what a GPU forbids while a CUDA graph is captured."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import DEVICE
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pretends_a_gpu = pytest.mark.skipif(DEVICE != "cpu", reason="takes the CPU for a GPU")
aten = torch.ops.aten
# Each has a result that the host must know, or a shape that depends on the data.
WAITING = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.unique_consecutive.default,
    aten._unique2.default,
    aten._linalg_check_errors.default,
}


class DeviceTensor(Tensor):
    """Takes every branch that a CUDA tensor takes in Python."""

    is_cpu = False
    is_cuda = True

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return on_device(self.as_subclass(Tensor).clone())


def on_device(value: Any) -> Any:
    """A tensor, or a named tuple of tensors, as on a GPU; it shares its memory."""
    if isinstance(value, Tensor):
        return value.as_subclass(DeviceTensor)
    if isinstance(value, tuple):
        items = [on_device(item) for item in value]
        return type(value)._make(items) if hasattr(value, "_make") else tuple(items)
    return value


class NoWait(TorchDispatchMode):
    """Raises where the host would wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITING:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def _one_hot(classes: Tensor, num_classes: int) -> Tensor:
    # On a CPU torch's own looks at the classes; on a GPU it does not.
    rows = torch.zeros(*classes.shape, num_classes, dtype=torch.int64)
    return rows.scatter(-1, classes.unsqueeze(-1), 1)


def _refuse(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("waits for the device")


@contextlib.contextmanager
def no_wait() -> Iterator[None]:
    """Within the block nothing reads a number off a tensor."""
    with pytest.MonkeyPatch.context() as patch, NoWait():
        patch.setattr(functional, "one_hot", _one_hot)
        for name in ("tolist", "numpy"):  # past the dispatcher
            patch.setattr(Tensor, name, _refuse)
        yield


class _Recording(NoWait):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.calls.append((func, args, kwargs or {}, result))
        return result


class Tape:
    """Records operations as a CUDA graph does: a replay repeats them on the same memory, and runs no Python.

    Recording runs them, which a CUDA graph does not; so the tensors that live from step to step are put back.
    """

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0
        self.recording = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "Tape":
        return self

    def record(self, function: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
        written: dict[int, tuple[Tensor, Tensor]] = {}
        mode = _Recording()
        self.recording = True
        try:
            with keep_inputs(written), no_wait(), mode:
                result = function()
        finally:
            self.recording = False
            for tensor, before in written.values():
                tensor.copy_(before)
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            for func, args, kwargs, outputs in mode.calls:
                again = func(*args, **kwargs)
                for tensor, fresh in zip(tree_leaves(outputs), tree_leaves(again), strict=True):
                    if isinstance(tensor, Tensor) and tensor.data_ptr() != fresh.data_ptr():
                        tensor.copy_(fresh)

        return result, replay


class keep_inputs(TorchDispatchMode):
    """Copies what an operation is about to write into, unless it was made inside."""

    def __init__(self, written: dict[int, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.written = written
        self.made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            for tensor in value if isinstance(value, list | tuple) else [value]:
                place = tensor.untyped_storage().data_ptr()
                if place not in self.made and place not in self.written:
                    self.written[place] = tensor, tensor.clone()
        result = func(*args, **(kwargs or {}))
        if not any(out.alias_info for out in func._schema.returns):
            self.made |= {t.untyped_storage().data_ptr() for t in tree_leaves(result) if isinstance(t, Tensor)}
        return result
