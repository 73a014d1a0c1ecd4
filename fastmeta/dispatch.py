"""Chooses the implementation of an operator: ``reference``, ``cpp``, ``cuda`` or ``triton``.

A named implementation (``impl=`` or :func:`use_impl`) is used or raises; it never falls back. With none named, the
fastest one on the tensors' device serves the call, except where a derivative of the result is being tracked: then the
reference does, because it is plain PyTorch and right under every kind of differentiation.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial, reduce, wraps
from operator import or_
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from fastmeta import _extension

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
IMPLEMENTATIONS = ("reference", "cpp", "cuda", "triton")


class _Override(threading.local):
    # Per thread like torch.no_grad; a ContextVar is opaque to torch.compile.
    def __init__(self) -> None:
        self.name: str | None = None


_override = _Override()
# Straight to the CPU kernel, past autograd. The other two keys resolve lazy negation and zero tensors on the way:
# without them a kernel would read the memory behind `x.conj().imag` with the wrong sign.
_DIRECT_KEYS = reduce(
    or_, (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)) for key in ("CPU", "Negative", "ZeroTensor"))
)
_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_active = torch._C._are_functorch_transforms_active
_tracing = torch._C._get_tracing_state


@contextlib.contextmanager
def use_impl(name: str) -> Iterator[None]:
    """Use implementation ``name`` for every operator called in the block, in this thread.

    Raises:
        ValueError: the name is none of ``reference``, ``cpp``, ``cuda``, ``triton``.

    >>> with use_impl("reference"):
    ...     pass
    """
    _known(name)
    before = _override.name
    _override.name = name
    try:
        yield
    finally:
        _override.name = before


def _known(name: str) -> None:
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {name!r}")


def in_own_dtype(reference: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Decorates a reference: it computes in its arguments' dtype within an autocast region too, as the kernels do."""

    @wraps(reference)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return reference(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return reference(*args, **kwargs)

    return call


class Operator:
    """One operator's kernels. ``select`` picks one for a call; None means the reference.

    Args:
        name: the name in the dispatcher, ``fastmeta::<name>``.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._direct: Callable[..., Any] | None = None  # no autograd, no dispatch modes
        self._dispatched: Callable[..., Any] | None = None
        if _extension.has_kernel(name, "CPU"):
            self._dispatched = getattr(torch.ops.fastmeta, name).default
            self._direct = partial(
                torch._C._dispatch_find_schema_or_throw(f"fastmeta::{name}", "").redispatch_boxed, _DIRECT_KEYS
            )

    def implementations(self) -> tuple[str, ...]:
        """Names of the implementations this installation has."""
        return ("reference", "cpp") if self._direct is not None else ("reference",)

    def select(self, impl: str | None, *tensors: Tensor | None) -> Callable[..., Any] | None:
        """The kernel that serves a call with these tensors, or None for the reference.

        Raises:
            ValueError: unknown ``impl``.
            RuntimeError: the named implementation is not available, not for this device, or not differentiable
                in forward mode.
        """
        named = impl if impl is not None else _override.name
        if (named is not None and not self._is_kernel(named)) or self._direct is None:
            return None
        if _functorch_active() or forward_ad._current_level >= 0:
            if named is None:
                return None
            raise RuntimeError(
                f"impl={named!r} of {self.name} has no forward-mode derivative or vmap rule; leave impl=None for the "
                "differentiable reference"
            )
        grad = torch.is_grad_enabled()
        watched = _compiling() or _dispatch_modes() > 0 or _tracing() is not None
        for tensor in tensors:
            if tensor is None:
                continue
            kind = type(tensor)
            if kind is not Tensor and kind is not Parameter:
                if not isinstance(tensor, Tensor):
                    return None  # the reference's check words the error
                watched = True
            if not tensor.is_cpu:
                if named is None:
                    return None
                raise RuntimeError(f"impl={named!r} needs CPU tensors, got one on {tensor.device}")
            if grad and tensor.requires_grad:
                if named is None:
                    return None
                watched = True  # the guard on the Autograd key raises when a backward reaches the kernel
        return self._dispatched if watched else self._direct

    def _is_kernel(self, name: str) -> bool:
        _known(name)
        if name == "reference":
            return False
        if name != "cpp":
            raise RuntimeError(f"{self.name} has no {name!r} implementation in this version of fastmeta")
        if self._direct is None:
            raise RuntimeError(_extension.REASON or f"{self.name} has no 'cpp' implementation")
        return True
