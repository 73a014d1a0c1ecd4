"""Chooses the implementation of an operator: ``reference``, ``cpp``, ``cuda`` or ``triton``.

A named implementation (``impl=`` or :func:`use_impl`) is used or raises; it never falls back. With none named, the
fastest one on the tensors' device serves the call, except where a derivative of the result is being tracked: then the
reference does, because it is plain PyTorch and right under every kind of differentiation.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastmeta import _extension

IMPLEMENTATIONS = ("reference", "cpp", "cuda", "triton")

_override: ContextVar[str | None] = ContextVar("fastmeta_impl", default=None)
_CPU_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_functorch_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


@contextlib.contextmanager
def use_impl(name: str) -> Iterator[None]:
    """Use implementation ``name`` for every operator called in the block.

    Raises:
        ValueError: the name is none of ``reference``, ``cpp``, ``cuda``, ``triton``.

    >>> with use_impl("reference"):
    ...     pass
    """
    _known(name)
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


def _known(name: str) -> None:
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {name!r}")


class _Call(Enum):
    DIRECT = "plain tensors, nothing watches: straight to the kernel"
    WATCHED = "a dispatch mode or a tensor subclass must see the call: through the dispatcher"
    BACKWARD = "an input requires grad"
    FORWARD = "a functorch transform or forward-mode level is active"


def _kind_of_call(tensors: tuple[Tensor | None, ...]) -> _Call:
    if _functorch_active() or forward_ad._current_level >= 0:
        return _Call.FORWARD
    grad = torch.is_grad_enabled()
    watched = _dispatch_modes() > 0
    for tensor in tensors:
        if tensor is not None:
            if grad and tensor.requires_grad:
                return _Call.BACKWARD
            watched = watched or type(tensor) not in _PLAIN_TYPES
    return _Call.WATCHED if watched else _Call.DIRECT


class Operator:
    """One operator's kernels. ``select`` picks one for a call; None means the reference.

    Args:
        name: the name in the dispatcher, ``fastmeta::<name>``.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._cpu: tuple[Callable[..., Any], Callable[..., Any]] | None = None
        if _extension.has_kernel(name, "CPU"):
            packet = getattr(torch.ops.fastmeta, name)
            default = packet.default

            def direct(*args: Any) -> Any:
                return default.redispatch(_CPU_KEYS, *args)

            self._cpu = direct, default

    def implementations(self) -> tuple[str, ...]:
        """Names of the implementations this installation has."""
        return ("reference", "cpp") if self._cpu is not None else ("reference",)

    def select(self, impl: str | None, *tensors: Tensor | None) -> Callable[..., Any] | None:
        """The kernel that serves a call with these tensors, or None for the reference.

        Raises:
            ValueError: unknown ``impl``.
            RuntimeError: the named implementation is not available, not for this device, or not differentiable
                in forward mode.
        """
        named = impl if impl is not None else _override.get()
        if named is None:
            return self._fastest(tensors)
        _known(named)
        if named == "reference":
            return None
        if named != "cpp":
            raise RuntimeError(f"{self.name} has no {named!r} implementation in this version of fastmeta")
        if self._cpu is None:
            raise RuntimeError(_extension.REASON or f"{self.name} has no 'cpp' implementation")
        for tensor in tensors:
            if tensor is not None and tensor.device.type != "cpu":
                raise RuntimeError(f"impl='cpp' needs CPU tensors, got one on {tensor.device}")
        if torch.compiler.is_compiling():
            return self._cpu[1]
        kind = _kind_of_call(tensors)
        if kind is _Call.FORWARD:
            raise RuntimeError(
                f"impl='cpp' of {self.name} has no forward-mode derivative or vmap rule; leave impl=None for the "
                "differentiable reference"
            )
        return self._cpu[0] if kind is _Call.DIRECT else self._cpu[1]

    def _fastest(self, tensors: tuple[Tensor | None, ...]) -> Callable[..., Any] | None:
        if self._cpu is None:
            return None
        for tensor in tensors:
            if tensor is not None and not tensor.is_cpu:
                return None
        if torch.compiler.is_compiling():
            grad = torch.is_grad_enabled()
            tracked = grad and any(tensor is not None and tensor.requires_grad for tensor in tensors)
            return None if tracked else self._cpu[1]
        kind = _kind_of_call(tensors)
        if kind is _Call.DIRECT:
            return self._cpu[0]
        return self._cpu[1] if kind is _Call.WATCHED else None
