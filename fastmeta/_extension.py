"""Loads the compiled kernels, or says once how to build them."""

import ctypes
import os
import warnings
from importlib import util
from pathlib import Path

import torch

import fastmeta

HOW_TO_BUILD = "build it with `pip install --no-build-isolation -e .` (needs a C++20 compiler)"
REASON: str | None = None
"""Why there are no C++ kernels."""
CUDA_REASON: str | None = None
"""Why there are no CUDA C++ kernels."""
TRITON_REASON: str | None = None
"""Why there are no Triton kernels."""
EMULATED = False
"""Whether the CUDA kernels compiled for the CPU are loaded, as the tests do."""

_HERE = Path(__file__).parent
# In a source tree whose extension was built in place, the folder of the Triton kernels lies beside this package.
if not (_HERE / "triton_kernels").exists() and (_HERE.parent / "triton_kernels/__init__.py").exists():
    fastmeta.__path__.append(str(_HERE.parent))

try:
    from fastmeta import _C  # type: ignore[attr-defined]
except ImportError as error:
    _C = None
    REASON = f"fastmeta's C++ extension is not loaded ({error}); {HOW_TO_BUILD}"
    warnings.warn(f"{REASON}. The slower reference path is used instead.", RuntimeWarning, stacklevel=2)

# Read by Triton when it is imported first: its interpreter runs kernels on the CPU, for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


_CUDA_LIBRARY = _HERE / "_C_cuda.so"


def _load_cuda() -> str | None:
    """Load ``_C_cuda.so``; returns why not."""
    if _C is None:
        return REASON
    if not torch.backends.cuda.is_built():
        return "this torch is built without CUDA"
    if not _CUDA_LIBRARY.exists():
        return f"fastmeta was built without nvcc; {HOW_TO_BUILD.removesuffix('(needs a C++20 compiler)')}where nvcc is"
    try:
        torch.ops.load_library(str(_CUDA_LIBRARY))
    except OSError as error:
        warnings.warn(f"fastmeta's CUDA library is not loaded ({error})", RuntimeWarning, stacklevel=3)
        return f"fastmeta's CUDA library is not loaded ({error})"
    return None


def _load_emulated() -> bool:
    library = os.environ.get("FASTMETA_CUDA_EMULATION")
    if not library or _C is None:
        return False
    torch.ops.load_library(library)
    return True


def _why_no_triton() -> str | None:
    if _C is None:
        return REASON
    if util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not (torch.backends.cuda.is_built() or INTERPRETED):
        return "this torch is built without CUDA, and TRITON_INTERPRET=1 is not set"
    return None


CUDA_REASON = _load_cuda()
EMULATED = _load_emulated()
TRITON_REASON = _why_no_triton()


def has_kernel(name: str, key: str, namespace: str = "fastmeta") -> bool:
    """Whether operator ``name`` has a kernel registered for dispatch key ``key`` (``"CPU"``, ``"CUDA"``)."""
    # hasattr: a build older than this source may lack the operator.
    defined = _C is not None and hasattr(getattr(torch.ops, namespace), name)
    return defined and torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{name}", key)


def cuda_natives() -> int:
    """Address of the function that lists the CUDA library's native operators (csrc/native.h); 0 if there is none."""
    if CUDA_REASON is not None:
        return 0
    function = getattr(ctypes.CDLL(str(_CUDA_LIBRARY)), "fastmeta_cuda_operators", None)
    return 0 if function is None else ctypes.cast(function, ctypes.c_void_p).value or 0


def build_info() -> dict[str, object] | None:
    """Compiler, instruction sets, threads, CUDA architectures, torch built against; None if there is no extension."""
    return None if _C is None else _C.build_info() | {"cuda_architectures": _architectures()}


def _architectures() -> list[str]:
    """Those of the CUDA library, if it is loaded."""
    if CUDA_REASON is not None:
        return []
    numbers = (ctypes.c_int * 16).in_dll(ctypes.CDLL(str(_CUDA_LIBRARY)), "fastmeta_cuda_architectures")
    return [f"sm_{number // 10}" for number in numbers if number]
