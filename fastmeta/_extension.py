"""Loads the compiled kernels, or says once how to build them."""

import warnings

import torch

HOW_TO_BUILD = "build it with `pip install --no-build-isolation -e .` (needs a C++20 compiler)"
REASON: str | None = None

try:
    from fastmeta import _C  # type: ignore[attr-defined]
except ImportError as error:
    _C = None
    REASON = f"fastmeta's C++ extension is not loaded ({error}); {HOW_TO_BUILD}"
    warnings.warn(f"{REASON}. The slower reference path is used instead.", RuntimeWarning, stacklevel=2)


def has_kernel(name: str, key: str) -> bool:
    """Whether operator ``name`` has a kernel registered for dispatch key ``key`` (``"CPU"``, ``"CUDA"``)."""
    # hasattr: a build older than this source may lack the operator.
    defined = _C is not None and hasattr(torch.ops.fastmeta, name)
    return defined and torch._C._dispatch_has_kernel_for_dispatch_key(f"fastmeta::{name}", key)


def build_info() -> dict[str, object] | None:
    """Compiler, instruction sets, threads and the torch it was built against; None if there is no extension."""
    return None if _C is None else _C.build_info()
