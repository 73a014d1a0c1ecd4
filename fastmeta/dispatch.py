"""Chooses the implementation of an operator: ``reference``, ``cpp``, ``cuda`` or ``triton``.

A named implementation (``impl=`` or :func:`use_impl`) is used or raises; it never falls back. With none named, the
fastest one on the tensors' device serves the call, except where a derivative of the result is being tracked: then the
reference does, because it is plain PyTorch and right under every kind of differentiation.

In the order of a call: the public function in ``fastmeta/ops`` tries :attr:`Operator.entry`, then asks
:meth:`Operator.select` for a kernel. Below them are the kernels, and what torch's dispatcher knows of an operator: its
fake kernel, and the guard against derivatives.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial, reduce, wraps
from importlib import import_module
from operator import or_
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from fastmeta import _extension

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Kernel = Callable[..., Any]  # takes the arguments of the registered schema (csrc/operators.cpp)
IMPLEMENTATIONS = ("reference", "cpp", "cuda", "triton")
NARROW_OUTPUTS = 32  # most classes of the CUDA C++ kernels that hold a row in one warp


class _Override(threading.local):
    # Per thread like torch.no_grad; a ContextVar is opaque to torch.compile.
    def __init__(self) -> None:
        self.name: str | None = None


_override = _Override()
_PLAIN = (Tensor, Parameter)
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


def named(impl: str | None) -> str | None:
    """The implementation that a call names, by its argument or by :func:`use_impl`."""
    return impl if impl is not None else _override.name


def unnamed(impl: str | None) -> bool:
    """Whether a call may go through the operator's ``entry``: no implementation is named, nothing is compiled."""
    return impl is None and _override.name is None and not _compiling()


def watched() -> bool:
    """Whether torch's dispatcher must see a call: it is compiled or traced, or a dispatch mode is on."""
    return _compiling() or _dispatch_modes() > 0 or _tracing() is not None


def forward_mode() -> bool:
    """Whether tensors may have tangents that no kernel sees: within torch.func, or a level of forward-mode AD."""
    return _functorch_active() or forward_ad._current_level >= 0


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


OPERATORS: dict[str, "Operator"] = {}
"""Every operator that the extension defines, by name."""


class Operator:
    """One operator's kernels, registered with torch's dispatcher when this is made.

    ``entry``, for a call that is :func:`unnamed`, takes the arguments of the schema straight to the kernel. It returns
    NotImplemented where a derivative is recorded, a mode or trace sees the call, an argument is of an unusual kind, or
    there is no plan for the layout yet. Then ``select`` picks a kernel; None means the reference.

    Args:
        name: the name in the dispatcher, ``fastmeta::<name>``.
        fake: the results' shapes, dtypes and device, as empty tensors, from the arguments of the schema.
        numbers: how many numbers follow the tensors of the schema; 0 for lists of tensors, which have no entry.
        triton: its file in triton_kernels/, which has a function ``plan``; CUDA C++ then takes at most 32 outputs.
            None: no Triton kernel, and CUDA C++ takes any size.
    """

    def __init__(self, name: str, *, fake: Kernel, numbers: int = 0, triton: str | None = None) -> None:
        self.name = name
        self.triton = triton
        self.numbers = numbers
        self.entry: Any = _extension.new_entry(name) if numbers else None
        self._kernels: dict[tuple[str, str | None], Kernel] = {}
        self._dispatched: Kernel | None = None
        # (device, implementation) that torch's dispatcher calls; a compiled or traced call can name no other.
        self._registered = {("cpu", "cpp")} | ({("cuda", "cuda")} if triton is None else set())
        if _extension.defines(name):  # a build older than this source may lack it
            OPERATORS[name] = self
            self._kernels = self._find_kernels()
            self._dispatched = getattr(torch.ops.fastmeta, name).default
            _register(name, fake, self._kernels.get(("cuda", None)) if triton is not None else None)

    def implementations(self, device: str | None = None) -> tuple[str, ...]:
        """Names of the implementations this installation has, on any device or on ``"cpu"`` or ``"cuda"``."""
        found = {implementation for kind, implementation in self._kernels if device in (None, kind)}
        return tuple(name for name in IMPLEMENTATIONS if name == "reference" or name in found)

    def select(self, impl: str | None, *tensors: Tensor | None) -> Kernel | None:
        """The kernel that serves a call with these tensors, or None for the reference.

        Raises:
            ValueError: unknown ``impl``.
            RuntimeError: the named implementation is not available, not for this device, or not differentiable
                in forward mode.
        """
        name = named(impl)
        if (name is not None and not self._is_kernel(name)) or not self._kernels:
            return None
        given = [tensor for tensor in tensors if tensor is not None]
        # The fast path: plain CPU tensors, no derivative, no mode.
        cpp = self._kernels.get(("cpu", "cpp")) if name in (None, "cpp") else None
        if (
            cpp is not None
            and not (watched() or forward_mode())
            and all([type(tensor) in _PLAIN and tensor.is_cpu and not tensor.requires_grad for tensor in given])
        ):
            return cpp
        plain = all([type(tensor) in _PLAIN for tensor in given])
        if not (plain or all([isinstance(tensor, Tensor) for tensor in given])):
            return None  # the reference raises the error
        tracked = torch.is_grad_enabled() and any([tensor.requires_grad for tensor in given])
        device = given[0].device.type if given else "cpu"
        why_not = self._why_not(name, given)
        if name is not None and why_not is not None:
            raise RuntimeError(f"impl={name!r} {why_not}")
        if name is None and (tracked or why_not is not None):
            return None
        if tracked or not plain or watched():
            if name is not None and (device, name) not in self._registered:
                what = "records a derivative" if tracked else "is compiled, traced or dispatched"
                raise RuntimeError(
                    f"impl={name!r} of {self.name} cannot be named where the call {what}; leave impl=None or detach"
                )
            return self._dispatched  # its guard raises when a backward reaches the kernel
        kernel = self._kernels.get((device, name))
        if kernel is not None and self.triton is not None and any([tensor.is_neg() for tensor in given]):
            return _resolved(kernel)
        return kernel

    def _why_not(self, name: str | None, given: list[Tensor]) -> str | None:
        """Why no kernel, or not the named one, takes these tensors."""
        if forward_mode():
            return (
                f"of {self.name} has no forward-mode derivative or vmap rule; leave impl=None for the differentiable "
                "reference"
            )
        for tensor in given:
            if (tensor.device.type, name) not in self._kernels:
                needed = " or ".join(kind.upper() for kind, each in self._kernels if each == name)
                return f"needs {needed} tensors, got one on {tensor.device}"
            if name is None and tensor.device != given[0].device:
                return "of more than one device"
        # The first tensor has the dtype of the products; others, such as epsilon, may be float64.
        if given and given[0].is_cuda and given[0].dtype == torch.float64 and self.triton is not None:
            return f"of {self.name} has no float64 on a GPU; use the reference"
        return None

    def _is_kernel(self, name: str) -> bool:
        _known(name)
        if name == "reference":
            return False
        if not any(implementation == name for _, implementation in self._kernels):
            reasons = {"cpp": _extension.REASON, "cuda": _extension.CUDA_REASON, "triton": _extension.TRITON_REASON}
            why = f": {reasons[name]}" if reasons[name] else ""
            raise RuntimeError(f"{self.name} has no {name!r} implementation here{why}")
        return True

    def _find_kernels(self) -> dict[tuple[str, str | None], Kernel]:
        """``(device type, implementation) -> kernel``; implementation None serves calls that name none."""
        found: dict[tuple[str, str | None], Kernel] = {}
        if _extension.has_kernel(self.name, "CPU"):
            found["cpu", "cpp"] = found["cpu", None] = direct(self.name, "CPU")
        if self.triton is None:
            if _extension.has_kernel(self.name, "CUDA"):
                found["cuda", "cuda"] = direct(self.name, "CUDA")
                found["cuda", None] = self._kept if self.numbers else found["cuda", "cuda"]
            elif _extension.EMULATED and _extension.has_kernel(self.name, "CPU", "fastmeta_emulated"):
                found["cpu", "cuda"] = direct(self.name, "CPU", "fastmeta_emulated")
            return found
        if self.entry.native[1]:
            found["cpu" if _extension.EMULATED else "cuda", "cuda"] = self._narrow
        if _extension.TRITON_REASON is None:
            found["cpu" if _extension.INTERPRETED else "cuda", "triton"] = self.planned(_extension.new_entry(self.name))
        if not _extension.INTERPRETED and found.keys() & {("cuda", "cuda"), ("cuda", "triton")}:
            found["cuda", None] = self._automatic(found)
        return found

    def _kept(self, *arguments: Any) -> Any:
        """The CUDA C++ kernel, whose next call with this layout comes through the entry."""
        result = self._kernels["cuda", "cuda"](*arguments)
        self.entry.keep(*arguments, _extension.NATIVE)
        return result

    def _automatic(self, found: dict[tuple[str, str | None], Kernel]) -> Kernel:
        """Serves CUDA tensors where nothing is named: mostly CUDA C++ up to 32 outputs, else Triton."""
        narrow = ("cuda", "cuda") in found
        general = self.planned(self.entry) if ("cuda", "triton") in found else None
        per_row = self.name in ("per_example_dot", "label_gradient")

        def choose(*arguments: Any) -> Any:
            # Of 16-bit tensors Triton's fused kernel makes a result for each row in 2.3 us where CUDA C++ takes 3.9.
            fused = per_row and arguments[0].dtype.itemsize == 2
            if general is not None and (not narrow or fused or _outputs(arguments) > NARROW_OUTPUTS):
                return general(*arguments)
            result = self._narrow(*arguments)
            self.entry.keep(*arguments, _extension.NATIVE)  # after it has checked its arguments
            return result

        return choose

    def _narrow(self, *arguments: Any) -> Any:
        """The CUDA C++ kernel for at most 32 outputs, not registered with the dispatcher on its own."""
        plain = [a.as_subclass(Tensor) if isinstance(a, Tensor) and type(a) is not Tensor else a for a in arguments]
        with _device_of(plain[0]):
            result = self.entry.cuda(*plain)
        if result is NotImplemented:
            raise RuntimeError(
                f"the CUDA kernel of {self.name} takes at most {NARROW_OUTPUTS} outputs, got {_outputs(arguments)}, "
                f"and no float64, got {arguments[0].dtype}"
            )
        return result

    def planned(self, entry: Any) -> Kernel:
        """The Triton implementation, with its plans kept in ``entry``."""
        plan_of: Callable[..., Any] | None = None

        def call(*arguments: Any) -> Any:
            nonlocal plan_of
            if plan_of is None:  # importing Triton takes half a second
                plan_of = import_module(f"fastmeta.triton_kernels.{self.triton}").plan
            from fastmeta.triton_kernels import _launch

            tensors, numbers = arguments[: -self.numbers], arguments[-self.numbers :]
            if _extension.INTERPRETED:  # planned at every call, so that its classes are checked
                return _one_or_all(plan_of(*arguments).run(tensors, numbers))
            with _device_of(arguments[0]):
                plan = entry.find(*arguments)
                if plan is None:
                    plan = _launch.plan(plan_of, tensors, numbers)
                    entry.keep(*arguments, plan)
                return _one_or_all(_launch.run(plan, tensors, numbers))

        return call


def direct(name: str, key: str, namespace: str = "fastmeta") -> Kernel:
    """The registered kernel, called below autograd and dispatch modes.

    The keys Negative and ZeroTensor resolve lazy negation and zero tensors: without them a kernel would read the memory
    behind ``x.conj().imag`` with the wrong sign.
    """
    keys = (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, one)) for one in (key, "Negative", "ZeroTensor"))
    schema = torch._C._dispatch_find_schema_or_throw(f"{namespace}::{name}", "")
    return partial(schema.redispatch_boxed, reduce(or_, keys))


def _resolved(kernel: Kernel) -> Kernel:
    """The kernel for arguments with the negative bit: they are resolved first, as the kernel reads memory itself."""
    return lambda *arguments: kernel(*(a.resolve_neg() if isinstance(a, Tensor) else a for a in arguments))


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _outputs(arguments: tuple[Any, ...]) -> int:
    """C of logits ``[N, C]``, or of the weight ``[C, D]`` that follows them."""
    _, logits, weight, *_ = arguments
    return weight.shape[0] if logits is None else logits.shape[-1]


def _one_or_all(results: tuple[Tensor, ...]) -> Any:
    return results[0] if len(results) == 1 else results


# Registration with torch's dispatcher, which gives an operator zero tangents in forward mode, without an error. The
# guard, on the Autograd key, raises instead: at once in forward mode, in the backward pass in reverse mode.

_AFTER_AUTOGRAD = torch._C._after_autograd_keyset
_LIBRARY = torch.library.Library("fastmeta", "IMPL")  # kept: its registrations end when it is collected


def _register(name: str, fake: Kernel, on_cuda: Kernel | None) -> None:
    torch.library.register_fake(f"fastmeta::{name}", fake, lib=_LIBRARY)
    _LIBRARY.impl(name, _guard(name), "Autograd", with_keyset=True)
    if on_cuda is not None:
        _LIBRARY.impl(name, on_cuda, "CUDA")


def _guard(name: str) -> Kernel:
    operator = getattr(torch.ops.fastmeta, name).default
    no_backward = (
        f"the kernel of fastmeta::{name} is not differentiable; call fastmeta.ops with impl=None for the "
        "differentiable reference, or detach its inputs"
    )

    class NotDifferentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, call: Kernel, arguments: tuple[Any, ...], *tensors: Tensor) -> Any:
            return call(*arguments)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            raise RuntimeError(no_backward)

    def guarded(keys: Any, *arguments: Any) -> Any:
        tensors = _tensors(arguments)
        if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            raise RuntimeError(
                f"fastmeta::{name} has no forward-mode derivative; call fastmeta.ops with impl=None for the "
                "differentiable reference"
            )

        def below(*values: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return operator.redispatch(keys & _AFTER_AUTOGRAD, *values)

        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            if name.endswith("_"):
                raise RuntimeError(f"fastmeta::{name} works in place and is not differentiable; use torch.no_grad()")
            if _functorch_active():  # torch.func transforms differentiate at once
                raise RuntimeError(no_backward)
            return NotDifferentiable.apply(below, arguments, *tensors)
        return below(*arguments)

    return guarded


def _tensors(arguments: tuple[Any, ...]) -> list[Tensor]:
    found: list[Tensor] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            found.append(argument)
        elif isinstance(argument, list | tuple):
            found.extend(item for item in argument if isinstance(item, Tensor))
    return found


def in_place(*arguments: Any) -> None:
    """The fake kernel of an operator without results."""
