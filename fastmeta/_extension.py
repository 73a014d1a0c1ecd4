"""Loads the compiled kernels, or says once how to build them; and where the plans of their calls are kept."""

import contextlib
import ctypes
import os
import warnings
from collections.abc import Hashable
from importlib import util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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


def defines(name: str, namespace: str = "fastmeta") -> bool:
    """Whether there is an operator ``name``; a build older than this source may lack it."""
    return _C is not None and hasattr(getattr(torch.ops, namespace), name)


def has_kernel(name: str, key: str, namespace: str = "fastmeta") -> bool:
    """Whether operator ``name`` has a kernel registered for dispatch key ``key`` (``"CPU"``, ``"CUDA"``)."""
    return defines(name, namespace) and torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{name}", key)


def cuda_natives() -> int:
    """Address of the function that lists the CUDA library's native operators (csrc/native.h); 0 if there is none."""
    library = os.environ["FASTMETA_CUDA_EMULATION"] if EMULATED else _CUDA_LIBRARY
    if CUDA_REASON is not None and not EMULATED:
        return 0
    function = getattr(ctypes.CDLL(str(library)), "fastmeta_cuda_operators", None)
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


# Plans by layout, and the way to them that spends no time in Python (csrc/entry/entry.cpp).

NATIVE = "native"
"""The plan of layouts that the native functions of the CUDA library serve."""
_MOST_PLANS = 4096
_every_entry: list[Any] = []


def new_entry(name: str, programs_on: str = "cuda") -> Any:
    """An entry: called with an operator's arguments, it runs the native function or the plan that serves them.

    It answers NotImplemented where there is none.

    Args:
        name: the operator's.
        programs_on: device whose tensors are served by plans; ``"cpu"`` where a GPU is pretended.
    """
    entry: Any = None
    if _C is not None and hasattr(_C, "Entry") and _C.has_exchange_api():
        # A torch that cannot allocate for it, an operator younger than the build.
        with contextlib.suppress(RuntimeError, ValueError):
            entry = _C.Entry(name, programs_on, cuda_natives())
    if entry is None:
        entry = SlowEntry()
    _every_entry.append(entry)
    return entry


def forget_plans() -> None:
    """Have every operator plan anew: what the plans were made from has changed."""
    for entry in _every_entry:
        entry.forget()


class SlowEntry:
    """Plans by layout where torch does not let C read its tensors: whoever finds one runs it."""

    native = (False, False)

    def __init__(self) -> None:
        self._plans: dict[Hashable, Any] = {}

    def __call__(self, *arguments: Any) -> Any:
        """No call is served here."""
        return NotImplemented

    def __len__(self) -> int:
        return len(self._plans)

    def find(self, *arguments: Any) -> Any:
        """The plan kept for arguments like these, or None."""
        return self._plans.get(_layout(arguments))

    def keep(self, *arguments_and_plan: Any) -> bool:
        """Keep a plan, the last argument, for arguments like these."""
        if len(self._plans) >= _MOST_PLANS:  # a loop whose batch size varies must not grow them without end
            self.forget()
        self._plans[_layout(arguments_and_plan[:-1])] = arguments_and_plan[-1]
        return True

    def forget(self) -> None:
        """Forget every plan."""
        self._plans.clear()


def _layout(arguments: tuple[Any, ...]) -> Hashable:
    # Of the numbers, those of an enum and flags choose a plan, and whether a float is 0.
    layouts = [
        (a.shape, a.stride(), a.dtype, a.device, a.data_ptr() % 16)
        if isinstance(a, Tensor)
        else (a if not isinstance(a, float) else a != 0)
        for a in arguments
    ]
    return (torch.backends.cuda.matmul.fp32_precision, *layouts)
