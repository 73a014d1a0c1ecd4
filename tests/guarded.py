"""Tensors that end, or begin, at the edge of readable memory: one element too far is a segmentation fault."""

import ctypes
import mmap

import torch
from torch import Tensor

_KEPT: list[mmap.mmap] = []
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def guarded(tensor: Tensor, edge: str) -> Tensor:
    """A contiguous copy whose last (``edge="end"``) or first (``"start"``) byte lies beside an unreadable page."""
    source = tensor.contiguous()
    size = source.numel() * source.element_size()
    if size == 0:
        return source
    page = mmap.PAGESIZE
    inside = -(-size // page) * page
    memory = mmap.mmap(-1, inside + 2 * page)
    _KEPT.append(memory)  # never unmapped: a tensor may outlive any owner kept here
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    offset = page + inside - size if edge == "end" else page
    copy = torch.frombuffer(memory, dtype=source.dtype, count=source.numel(), offset=offset).view(source.shape)
    copy.copy_(source)
    for fence in (start, start + page + inside):
        if _libc.mprotect(fence, page, 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect failed")
    return copy
