"""Buffers kept between calls: the page faults of a fresh 100 MB cost more than the work done on it."""

import threading

import torch
from torch import Tensor

_KEPT = 2  # what one perturbation in each of two threads needs
_lock = threading.Lock()
_free: list[Tensor] = []


def take(num_bytes: int, device: torch.device) -> Tensor:
    """A uint8 buffer of at least this size, the caller's alone until given back. New ones begin with 0.

    On a GPU it is a new one: torch keeps freed memory itself, and knows which stream and which graph it is for.
    """
    if device.type != "cpu":
        buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        buffer[:64].zero_()
        return buffer
    with _lock:
        fitting = [buffer for buffer in _free if num_bytes <= buffer.numel() <= 2 * num_bytes]
        if fitting:
            best = min(fitting, key=Tensor.numel)
            _free[:] = [buffer for buffer in _free if buffer is not best]
            return best
    buffer = torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
    buffer[:64] = 0
    return buffer


def give(buffer: Tensor) -> None:
    """Hand a buffer back; the ones given back last are kept."""
    if not buffer.is_cpu:
        return
    with _lock:
        _free.append(buffer)
        del _free[:-_KEPT]


def free_workspace() -> int:
    """Free the memory that fastmeta keeps for its next call, and say how many bytes that was.

    It is at most two copies of the parameters last given to :class:`perturbed` on the CPU.

    >>> free_workspace() >= 0
    True
    """
    with _lock:
        freed = sum(buffer.numel() for buffer in _free)
        _free.clear()
    return freed
