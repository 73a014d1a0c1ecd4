"""The kernels of an operator by device and implementation, as functions of the registered schema's arguments."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial, reduce
from importlib import import_module
from operator import or_
from typing import Any

import torch
from torch import Tensor

from fastmeta import _entry, _extension

Kernel = Callable[..., Any]

# The file of each operator that has a Triton kernel, in triton_kernels/.
TRITON = {
    "last_layer_gradient": "last_layer_gradient",
    "per_example_dot": "per_example_dot",
    "label_gradient": "label_gradient",
    "hessian_vector_product": "hvp",
    "feature_similarity": "feature_similarity",
    "finite_difference_labels": "finite_difference_labels",
}
NARROW_OUTPUTS = 32  # most classes of the CUDA C++ kernels that hold a row in one warp


def direct(name: str, key: str, namespace: str = "fastmeta") -> Kernel:
    """The registered kernel past autograd and dispatch modes.

    The other two keys resolve lazy negation and zero tensors on the way: without them a kernel would read the memory
    behind ``x.conj().imag`` with the wrong sign.
    """
    keys = (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, one)) for one in (key, "Negative", "ZeroTensor"))
    schema = torch._C._dispatch_find_schema_or_throw(f"{namespace}::{name}", "")
    return partial(schema.redispatch_boxed, reduce(or_, keys))


def resolved(kernel: Kernel) -> Kernel:
    """For arguments among which there are views that say "negate me": a function that reads memory itself."""

    def call(*arguments: Any) -> Any:
        return kernel(*(a.resolve_neg() if isinstance(a, Tensor) else a for a in arguments))

    return call


def triton(name: str, entry: Any) -> Kernel:
    """The Triton implementation, imported at its first call: importing Triton takes half a second.

    Args:
        name: the operator's.
        entry: where the plans are kept.
    """
    module: Any = None

    def call(*arguments: Any) -> Any:
        nonlocal module
        if module is None:
            module = import_module(f"fastmeta.triton_kernels.{TRITON[name]}")
        return _planned(module.plan, entry, _entry.OPERATORS[name], arguments)

    return call


def _planned(plan_of: Callable[..., Any], entry: Any, count: int, arguments: tuple[Any, ...]) -> Any:
    """Run the plan of this layout, made if there is none yet; ``count`` numbers follow the tensors."""
    from fastmeta import _launch  # needs Triton

    tensors, numbers = arguments[:-count], arguments[-count:]
    if _extension.INTERPRETED:  # anew each time, so that the classes of every call are checked
        return _one_or_all(plan_of(*arguments).run(tensors, numbers))
    first: Tensor = arguments[0]
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        plan = entry.find(*arguments)
        if plan is None:
            plan = _launch.plan(plan_of, tensors, numbers)
            entry.keep(*arguments, plan)
        results = _launch.run(plan, tensors, numbers)
    return _one_or_all(results)


def _one_or_all(results: tuple[Tensor, ...]) -> Any:
    return results[0] if len(results) == 1 else results


def automatic(name: str) -> Kernel | None:
    """What serves CUDA tensors when nothing is named: mostly the narrow kernel up to 32 outputs, else Triton's."""
    entry = _entry.of(name)
    general = triton(name, entry) if name in TRITON and _extension.TRITON_REASON is None else None
    if not _extension.has_kernel(f"{name}_narrow", "CUDA"):
        return general
    narrow = direct(f"{name}_narrow", "CUDA")

    def choose(features: Tensor, logits: Tensor | None, weight: Tensor, *rest: Any) -> Any:
        outputs = weight.shape[0] if logits is None else logits.shape[-1]
        # Of 16-bit tensors Triton's fused kernel makes a result for each row in 2.3 us where the narrow one takes 3.9.
        fused = features.dtype.itemsize == 2 and name in ("per_example_dot", "label_gradient")
        if general is not None and (outputs > NARROW_OUTPUTS or fused):
            return general(features, logits, weight, *rest)
        result = narrow(features, logits, weight, *rest)
        entry.keep(features, logits, weight, *rest, _entry.NATIVE)  # after it has checked its arguments
        return result

    return choose


def kept(name: str, kernel: Kernel) -> Kernel:
    """A CUDA C++ kernel whose next call with this layout comes through the entry."""
    entry = _entry.of(name)

    def call(*arguments: Any) -> Any:
        result = kernel(*arguments)
        entry.keep(*arguments, _entry.NATIVE)
        return result

    return call


def by_device(name: str) -> dict[tuple[str, str | None], Kernel]:
    """``(device type, implementation) -> kernel``; the implementation None is the one that is used unnamed."""
    found: dict[tuple[str, str | None], Kernel] = {}
    if _extension.has_kernel(name, "CPU"):
        found["cpu", "cpp"] = found["cpu", None] = direct(name, "CPU")
    narrow = f"{name}_narrow"
    if _extension.EMULATED:
        for emulated in (name, narrow):
            if _extension.has_kernel(emulated, "CPU", "fastmeta_emulated"):
                found["cpu", "cuda"] = direct(emulated, "CPU", "fastmeta_emulated")
    if name in TRITON:
        if _extension.TRITON_REASON is None:
            found["cpu" if _extension.INTERPRETED else "cuda", "triton"] = triton(name, _entry.entry(name))
        if _extension.has_kernel(narrow, "CUDA"):
            found["cuda", "cuda"] = direct(narrow, "CUDA")
        if not _extension.INTERPRETED and (kernel := automatic(name)) is not None:
            found["cuda", None] = kernel
    elif _extension.has_kernel(name, "CUDA"):
        found["cuda", "cuda"] = direct(name, "CUDA")
        found["cuda", None] = kept(name, found["cuda", "cuda"]) if name in _entry.OPERATORS else found["cuda", "cuda"]
    return found
