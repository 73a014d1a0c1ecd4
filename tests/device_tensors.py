"""CPU tensors that say they are on a GPU, and what a GPU forbids while a CUDA graph is captured."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

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
