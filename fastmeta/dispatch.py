"""Chooses the implementation of an operator: ``reference``, ``cpp``, ``cuda`` or ``triton``.

A named implementation (``impl=`` or :func:`use_impl`) is used or raises; it never falls back. With none named, the
fastest one on the tensors' device serves the call, except where a derivative of the result is being tracked: then the
reference does, because it is plain PyTorch and right under every kind of differentiation.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from fastmeta import _entry, _extension, _kernels

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
IMPLEMENTATIONS = ("reference", "cpp", "cuda", "triton")


class _Override(threading.local):
    # Per thread like torch.no_grad; a ContextVar is opaque to torch.compile.
    def __init__(self) -> None:
        self.name: str | None = None


_override = _Override()
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


def unnamed(impl: str | None) -> bool:
    """Whether a call may go through the operator's ``entry``: no implementation is named, nothing is compiled."""
    return impl is None and _override.name is None and not _compiling()


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
    """One operator's kernels.

    ``entry``, for a call that is :func:`unnamed`, takes the arguments of the schema straight to the kernel, or answers
    NotImplemented: a derivative is recorded, something watches the call, the arguments are of an unusual kind, or there
    is no plan for them yet. Then ``select`` picks a kernel; None means the reference.

    Args:
        name: the name in the dispatcher, ``fastmeta::<name>``.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.entry: Any = _entry.of(name) if name in _entry.OPERATORS else None
        self._kernels = _kernels.by_device(name)
        self._float64_on_cuda = name not in _kernels.TRITON
        # What the dispatcher itself would take for a device; other names cannot be seen by it.
        self._registered = {("cpu", "cpp")} | ({("cuda", "cuda")} if name not in _kernels.TRITON else set())
        # Functions in Python get what the dispatcher would otherwise resolve on its way to a kernel.
        self._reads_memory = any(implementation == "triton" for _, implementation in self._kernels)
        # Through autograd and the dispatch modes, for who watches the call.
        self._dispatched = getattr(torch.ops.fastmeta, name).default if self._kernels else None

    def implementations(self, device: str | None = None) -> tuple[str, ...]:
        """Names of the implementations this installation has, on any device or on ``"cpu"`` or ``"cuda"``."""
        found = {implementation for kind, implementation in self._kernels if device in (None, kind)}
        return tuple(name for name in IMPLEMENTATIONS if name == "reference" or name in found)

    def select(self, impl: str | None, *tensors: Tensor | None) -> Callable[..., Any] | None:
        """The kernel that serves a call with these tensors, or None for the reference.

        Raises:
            ValueError: unknown ``impl``.
            RuntimeError: the named implementation is not available, not for this device, or not differentiable
                in forward mode.
        """
        named = impl if impl is not None else _override.name
        if (named is not None and not self._is_kernel(named)) or not self._kernels:
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
        tracked = negated = False
        reads_memory = self._reads_memory and not watched  # torch.compile does not trace is_neg
        where: str | torch.device | None = None
        device = "cpu"
        kernel = None
        for tensor in tensors:
            if tensor is None:
                continue
            kind = type(tensor)
            if kind is not Tensor and kind is not Parameter:
                if not isinstance(tensor, Tensor):
                    return None  # the reference's check words the error
                watched = True
            place = "cpu" if tensor.is_cpu else tensor.device  # with its number: a kernel works on one GPU
            if place != where:
                if where is not None and named is None:
                    return None
                where = place
                device = "cpu" if place == "cpu" else tensor.device.type
                kernel = self._kernels.get((device, named))
                if kernel is None:
                    if named is None:
                        return None
                    raise RuntimeError(self._wrong_device(named, tensor.device))
                if device == "cuda" and tensor.dtype == torch.float64 and not self._float64_on_cuda:
                    if named is None:
                        return None
                    raise RuntimeError(f"impl={named!r} of {self.name} has no float64 on a GPU; use the reference")
            if grad and tensor.requires_grad:
                if named is None:
                    return None
                tracked = True
            if reads_memory and tensor.is_neg():
                negated = True
        if where is None:  # a list without tensors
            kernel = self._kernels.get((device, named))
        if not (watched or tracked):
            return _kernels.resolved(kernel) if negated and kernel is not None else kernel
        if named is not None and (device, named) not in self._registered:
            what = "records a derivative" if tracked else "is compiled, traced or dispatched"
            raise RuntimeError(
                f"impl={named!r} of {self.name} cannot be named where the call {what}; leave impl=None or detach"
            )
        return self._dispatched  # the guard on the Autograd key raises when a backward reaches the kernel

    def _wrong_device(self, named: str, device: torch.device) -> str:
        kinds = {"cpu": "CPU", "cuda": "CUDA"}
        needed = " or ".join(kinds[kind] for kind, name in self._kernels if name == named)
        return f"impl={named!r} needs {needed} tensors, got one on {device}"

    def _is_kernel(self, name: str) -> bool:
        _known(name)
        if name == "reference":
            return False
        if not any(implementation == name for _, implementation in self._kernels):
            reasons = {
                "cpp": _extension.REASON,
                "cuda": _extension.CUDA_REASON,
                "triton": _extension.TRITON_REASON,
            }
            why = f": {reasons[name]}" if reasons[name] else ""
            raise RuntimeError(f"{self.name} has no {name!r} implementation here{why}")
        return True
