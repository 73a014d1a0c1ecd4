"""What the operators that write into their arguments have in common."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastmeta import checks

Named = Sequence[tuple[str, Tensor]]


def refuse_grad(name: str, tensors: Iterable[Tensor]) -> None:
    """An in-place operator has no derivative: tensors that require grad are for ``torch.no_grad()``."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(f"{name} works in place and is not differentiable; use torch.no_grad()")


def written(tensors: Sequence[Tensor]) -> None:
    """Tell autograd that a kernel wrote here, so that a backward through the old values raises."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensors)


def average(tensor: object, name: str, first: Tensor, first_name: str) -> Tensor:
    """A running average: the shape, device and dtype of ``first``, or float32 beside 16-bit numbers."""
    checked = checks.shaped(tensor, name, f"the shape of {first_name}", first.shape)
    if checked.device != first.device:
        raise ValueError(f"{name} must be on {first.device} like {first_name}, got {checked.device}")
    if checked.dtype != torch.float32 or first.dtype == torch.float64:
        checks.like(first, first_name, **{name: checked})
    return checked


def disjoint(writes: Named, reads: Named = ()) -> None:
    """No memory is written twice, nor written under one name and read under another.

    Columns of one buffer (``state[:, 0]`` and ``state[:, 1]``) are told apart; other views whose address ranges cross
    are refused.
    """
    if torch.compiler.is_compiling() or any(not _has_memory(tensor) for _, tensor in [*writes, *reads]):
        return
    for name, tensor in writes:
        if not _has_own_memory(tensor):
            raise ValueError(f"{name} must have memory of its own for each element, got strides {tensor.stride()}")
    spans = sorted(
        (tensor.data_ptr(), _end(tensor), index, index < len(writes))
        for index, (_, tensor) in enumerate([*writes, *reads])
        if tensor.numel()
    )
    named = [*writes, *reads]
    live: list[tuple[int, int, bool]] = []
    for begin, end, index, is_written in spans:
        live = [other for other in live if other[0] > begin]
        for _, other, other_written in live:
            if (is_written or other_written) and not _interleaved(named[index][1], named[other][1]):
                first, second = sorted((index, other))
                raise ValueError(f"{named[first][0]} and {named[second][0]} must not share memory")
        live.append((end, index, is_written))


def _has_memory(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type not in ("meta", "lazy")


def _has_own_memory(tensor: Tensor) -> bool:
    inner = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= inner:
                return False
            inner += (size - 1) * stride
    return True


def _end(tensor: Tensor) -> int:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (last + 1) * tensor.element_size()


def _interleaved(a: Tensor, b: Tensor) -> bool:
    """Whether rows of ``a`` and ``b``, of one stride, lie beside each other."""
    if not (a.dim() and b.dim()):
        return False
    period = a.stride(0) * a.element_size()
    width_a, width_b = (_end(t[0]) - t[0].data_ptr() for t in (a, b))
    offset = (b.data_ptr() - a.data_ptr()) % period if period else 0
    return b.stride(0) * b.element_size() == period and width_a <= offset and offset + width_b <= period
