"""The operators on lists past torch's dispatcher, where nothing must see the call (``csrc/lists/module.cpp``)."""

import os
from types import ModuleType

import torch

from fastmeta import _extension, dispatch


def _load() -> ModuleType | None:
    if _extension._C is None:
        return None
    try:
        from fastmeta import _C_lists  # type: ignore[attr-defined]

        if torch.__version__ != _C_lists.BUILT_FOR_TORCH:
            return None
        _C_lists.use("cpp", _extension._C.__file__)
        if _extension.CUDA_REASON is None:
            _C_lists.use("cuda", str(_extension._CUDA_LIBRARY))
        if _extension.EMULATED:
            _C_lists.use("emulated", os.environ["FASTMETA_CUDA_EMULATION"])
    except (ImportError, RuntimeError):  # torch had other functions then, or a library is of an older build
        return None
    return _C_lists


KERNELS = _load()


def unseen(impl: str | None) -> tuple[ModuleType, str | None] | None:
    """The functions that may serve a call, with the name of the implementation for them.

    None where the dispatcher must see it: it is compiled, traced, differentiated or watched by a mode, or another
    implementation is named.
    """
    if torch.compiler.is_compiling() or KERNELS is None:
        return None
    name = dispatch.named(impl)
    if name not in (None, "cpp", "cuda") or dispatch.watched() or dispatch.forward_mode():
        return None
    return KERNELS, name
