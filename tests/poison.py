"""Uninitialized memory made visible: fresh allocations hold NaN or numbers near the largest there are."""

import contextlib
import ctypes
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

_TORCH_LIBRARIES = Path(torch.__file__).parent / "lib"
_M_PERTURB = -6  # <malloc.h>


def _junk_fill() -> ctypes.c_bool | None:
    """The switch in c10's CPU allocator, which serves Python, ATen and the stable C ABI alike (pattern 0x7fedbeef)."""
    for library in _TORCH_LIBRARIES.glob("libc10.*"):
        with contextlib.suppress(OSError, ValueError):
            return ctypes.c_bool.in_dll(ctypes.CDLL(str(library)), "FLAGS_caffe2_cpu_allocator_do_junk_fill")
    return None


JUNK_FILL = _junk_fill()
GLIBC = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Poison torch's tensors (all NaN where ATen allocates them) and, under glibc, the bytes of plain malloc."""
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if JUNK_FILL is not None:
        JUNK_FILL.value = True
    if GLIBC is not None:
        GLIBC.mallopt(_M_PERTURB, 0x81)  # malloc fills with the complement, 0x7e: huge in every floating type
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        if GLIBC is not None:
            GLIBC.mallopt(_M_PERTURB, 0)
        if JUNK_FILL is not None:
            JUNK_FILL.value = False
