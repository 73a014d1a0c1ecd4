"""Arithmetic of directions: a last layer's ``(V, b)`` and a model's dict of tensors alike, as lists of tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmeta.problem.direction import AnyDirection, Dense, Direction, Factors


def dense(direction: AnyDirection) -> Dense:
    """Itself; factors are multiplied out."""
    return direction if isinstance(direction, dict) else direction.dense()


def tensors(direction: AnyDirection) -> list[Tensor]:
    """The tensors that move, in a fixed order; factors are multiplied out."""
    if isinstance(direction, dict):
        return list(direction.values())
    return [tensor for tensor in direction.dense() if tensor is not None]


def rebuilt(like: Dense, values: Sequence[Tensor]) -> Dense:
    """A direction of the same form with other values; the inverse of :func:`tensors`."""
    if isinstance(like, dict):
        return dict(zip(like, values, strict=True))
    return Direction(values[0], None if like.bias is None else values[1])


def flat(direction: AnyDirection) -> Tensor:
    """All tensors concatenated, in the widest of their dtypes and no less than float32. ``[P]``."""
    parts = tensors(direction)
    dtype = torch.float32
    for part in parts:
        dtype = torch.promote_types(dtype, part.dtype)
    return torch.cat([part.reshape(-1).to(dtype) for part in parts])


def unflat(like: Dense, values: Tensor) -> Dense:
    """The inverse of :func:`flat`: views of ``values [P]``, in the dtypes of ``like`` where those differ."""
    parts = tensors(like)
    pieces = values.split([part.numel() for part in parts])
    return rebuilt(like, [piece.view(part.shape).to(part.dtype) for piece, part in zip(pieces, parts, strict=True)])


def scaled(direction: AnyDirection, factor: Tensor | float) -> AnyDirection:
    """``factor v``."""
    if isinstance(direction, Factors):
        return direction._replace(residual=direction.residual * factor, tangent=None)
    return rebuilt(direction, torch._foreach_mul(tensors(direction), factor))


def combined(first: AnyDirection, factor: float, second: AnyDirection) -> Dense:
    """``first + factor second``; a tensor that one of the two lacks counts as 0 there."""
    a, b = dense(first), dense(second)
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() != b.keys():
        zeros = {name: torch.zeros_like(value) for name, value in {**a, **b}.items()}
        a, b = {**zeros, **a}, {**zeros, **b}
    return rebuilt(a, torch._foreach_add(tensors(a), tensors(b), alpha=factor))


def norm(direction: AnyDirection) -> Tensor:
    """Euclidean length over all tensors together, at least the dtype's smallest normal number. Scalar."""
    lengths = torch.stack(torch._foreach_norm(tensors(direction)))
    return torch.linalg.vector_norm(lengths).clamp_min(torch.finfo(lengths.dtype).tiny)
