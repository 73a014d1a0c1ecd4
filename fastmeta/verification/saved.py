"""Single pieces of state: what they were, whether they still are, and the way back."""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor, nn

PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_MISSING = object()


class SavedTensor(NamedTuple):
    """A tensor with its values, its flag and its gradient."""

    name: str
    tensor: Tensor
    value: Tensor | None  # None: only its identity and gradient are looked at
    requires_grad: bool
    grad: Tensor | None
    grad_value: Tensor | None

    def is_changed(self) -> bool:
        """Whether anything of it is not as it was."""
        tensor = self.tensor
        if self.value is not None and not is_same(tensor.detach(), self.value):
            return True
        if tensor.is_leaf and tensor.requires_grad != self.requires_grad:
            return True
        return self.has_new_gradient()

    def has_new_gradient(self) -> bool:
        """Whether its ``.grad`` is another tensor, or has other values."""
        grad = _grad(self.tensor)
        return grad is not self.grad or (self.grad_value is not None and not is_same(grad, self.grad_value))

    def restore(self) -> None:
        """Put it back, in its own memory."""
        tensor = self.tensor
        if self.value is not None and not is_same(tensor.detach(), self.value):
            if tensor.shape == self.value.shape:
                tensor.data.copy_(self.value)
            else:
                tensor.data = self.value.clone()
        if tensor.is_leaf and tensor.requires_grad != self.requires_grad:
            tensor.requires_grad_(self.requires_grad)
        if _grad(tensor) is not self.grad:
            tensor.grad = self.grad
        if self.grad is not None and self.grad_value is not None and not is_same(self.grad, self.grad_value):
            self.grad.data.copy_(self.grad_value)


class SavedGenerator(NamedTuple):
    """Something with a state that can be read and written as a whole: a generator of random numbers, an array."""

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], Any]
    value: Any


class SavedHolder:
    """Something with named or numbered entries, and which ones it had."""

    def __init__(
        self, name: Callable[[Any], str], read: Callable[[], dict[Any, Any]], write: Callable[[dict[Any, Any]], None]
    ) -> None:
        self._name = name
        self._read = read
        self._write = write
        self._saved = read()

    def changed(self, same: Callable[[Any, Any], bool]) -> list[str]:
        """Names of the entries that are not the same."""
        now = self._read()
        keys = [*self._saved, *(key for key in now if key not in self._saved)]
        pairs = [(key, now.get(key, _MISSING), self._saved.get(key, _MISSING)) for key in keys]
        return [self._name(key) for key, new, old in pairs if not same(new, old)]

    def restore(self) -> None:
        """Put every entry back."""
        if self.changed(same_object):
            self._write(self._saved)


def _grad(tensor: Tensor) -> Tensor | None:
    return tensor.grad if tensor.is_leaf else None


def saved(name: str, tensor: Tensor) -> SavedTensor:
    """A tensor as it is now."""
    grad = _grad(tensor)
    return SavedTensor(name, tensor, _copy(tensor), tensor.requires_grad, grad, None if grad is None else _copy(grad))


def _copy(tensor: Tensor) -> Tensor | None:
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized or tensor.is_meta:
        return None
    with torch.inference_mode(False):
        return tensor.detach().clone()


def same_object(now: Any, before: Any) -> bool:
    """The very same, or an equal number or string."""
    return now is before or (isinstance(now, PLAIN) and type(now) is type(before) and is_same(now, before))


def same_value(now: Any, before: Any) -> bool:
    """As :func:`same_object`, but for what no one holds on to: a new object may be equal to the old one."""
    if same_object(now, before):
        return True
    if type(now) is not type(before) or isinstance(now, nn.Parameter):
        return False
    if isinstance(now, Tensor):
        return is_same(now.detach(), before.detach())
    if isinstance(now, (list, tuple)):
        return len(now) == len(before) and all(map(same_value, now, before))
    return isinstance(now, weakref.ref) and now() is before()


def is_same(now: Any, before: Any) -> bool:
    """Equal, NaN included."""
    if isinstance(now, Tensor):
        if now.shape != before.shape or now.dtype != before.dtype or now.device != before.device:
            return False
        return torch.equal(now, before) or bool(((now == before) | ((now != now) & (before != before))).all())
    if isinstance(now, numpy.ndarray):
        return now.dtype == before.dtype and numpy.array_equal(now, before, equal_nan=now.dtype.kind in "fc")
    if isinstance(now, dict):
        return now.keys() == before.keys() and all(is_same(now[key], before[key]) for key in now)
    if isinstance(now, tuple):
        return len(now) == len(before) and all(map(is_same, now, before))
    return bool(now == before) or (now != now and before != before)
