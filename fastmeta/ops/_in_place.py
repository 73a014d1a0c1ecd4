"""What the operators that write into their arguments have in common."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmeta import checks
from fastmeta.ops import _lists

Named = Sequence[tuple[str, Tensor]]


def refuse_grad(name: str, tensors: Iterable[Tensor]) -> None:
    """An in-place operator has no derivative: tensors that require grad are for ``torch.no_grad()``."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(f"{name} works in place and is not differentiable; use torch.no_grad()")


def written(tensors: Sequence[Tensor]) -> None:
    """Tell autograd that a kernel wrote here, so that a backward through the old values raises."""
    if torch.compiler.is_compiling():
        return
    if _lists.KERNELS is not None and isinstance(tensors, list):
        _lists.KERNELS.written(tensors)
    else:
        torch.autograd.graph.increment_version(tensors)


def versions(tensors: list[Tensor]) -> list[int]:
    """What autograd counts; -1 for an inference tensor, which has no count."""
    if _lists.KERNELS is not None and not torch.compiler.is_compiling():
        return list(_lists.KERNELS.versions(tensors))
    return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]


def addresses(tensors: list[Tensor]) -> list[int]:
    """Where the memory of each begins; 0 for a tensor that has none to look at."""
    looked_at = not torch.compiler.is_compiling()
    return [tensor.data_ptr() if looked_at and _has_memory(tensor) else 0 for tensor in tensors]


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
    named = [*writes, *reads]
    spans = [
        _Span(tensor.data_ptr(), _end(tensor), index, index < len(writes), tensor)
        for index, (_, tensor) in enumerate(named)
        if tensor.numel()
    ]
    for chain in _chains(spans):
        if not any(span.written for span in chain) or _columns(chain):
            continue
        for a, b in itertools.combinations(chain, 2):
            if (a.written or b.written) and b.begin < a.end and not _interleaved(a.tensor, b.tensor):
                first, second = sorted((a.place, b.place))
                raise ValueError(f"{named[first][0]} and {named[second][0]} must not share memory")


class _Span(NamedTuple):
    begin: int
    end: int
    place: int  # among the arguments
    written: bool
    tensor: Tensor


def _chains(spans: list[_Span]) -> Iterator[list[_Span]]:
    """Groups of spans that meet each other, or meet through others, in the order of their beginnings."""
    chain: list[_Span] = []
    end = 0
    for span in sorted(spans, key=lambda span: span.begin):
        if chain and span.begin >= end:
            yield chain
            chain = []
        chain.append(span)
        end = max(end, span.end)
    yield chain


def _columns(chain: list[_Span]) -> bool:
    """Whether these are rows of one stride beside each other: known by sorting, where pairs would be many."""
    first = chain[0]
    period = first.tensor.stride(0) * first.tensor.element_size() if first.tensor.dim() else 0
    if period == 0 or any(not t.dim() or t.stride(0) * t.element_size() != period for *_, t in chain):
        return False
    places = sorted(((span.begin - first.begin) % period, _width(span.tensor)) for span in chain)
    places.append((places[0][0] + period, 0))
    return all(place + width <= after for (place, width), (after, _) in itertools.pairwise(places))


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


def _width(tensor: Tensor) -> int:
    """Bytes from the beginning of a row to its end."""
    return _end(tensor[0]) - tensor[0].data_ptr()


def _interleaved(a: Tensor, b: Tensor) -> bool:
    """Whether rows of ``a`` and ``b``, of one stride, lie beside each other."""
    if not (a.dim() and b.dim()):
        return False
    period = a.stride(0) * a.element_size()
    offset = (b.data_ptr() - a.data_ptr()) % period if period else 0
    return b.stride(0) * b.element_size() == period and _width(a) <= offset and offset + _width(b) <= period
