"""Arithmetic of directions: a last layer's ``(V, b)`` and a model's dict of tensors alike, as lists of tensors."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from fastmeta.problem import AnyDirection, Direction, Factors

Dense = TypeVar("Dense", Direction, dict[str, Tensor])


def tensors(direction: AnyDirection) -> list[Tensor]:
    """The tensors that move, in a fixed order; factors are multiplied out."""
    if isinstance(direction, dict):
        return list(direction.values())
    dense = direction.dense()
    return [dense.weight] if dense.bias is None else [dense.weight, dense.bias]


def rebuilt(direction: Dense, values: Sequence[Tensor]) -> Dense:
    """A direction of the same form with other values; the inverse of :func:`tensors`."""
    if isinstance(direction, dict):
        return dict(zip(direction, values, strict=True))
    return Direction(values[0], None if direction.bias is None else values[1])


def dense(direction: AnyDirection) -> Direction | dict[str, Tensor]:
    """Itself; factors are multiplied out."""
    return direction if isinstance(direction, dict) else direction.dense()


def scaled(direction: AnyDirection, factor: Tensor | float) -> AnyDirection:
    """``factor v``."""
    if isinstance(direction, Factors):
        return direction._replace(residual=direction.residual * factor)
    return rebuilt(direction, torch._foreach_mul(tensors(direction), factor))


def combined(first: Dense, factor: float, second: Dense) -> Dense:
    """``first + factor second``; a tensor that only one of the two has is taken as 0 in the other."""
    if isinstance(first, dict) and first.keys() != second.keys():
        zeros = {name: torch.zeros_like(value) for name, value in {**first, **second}.items()}
        first, second = {**zeros, **first}, {**zeros, **second}
    return rebuilt(first, torch._foreach_add(tensors(first), tensors(second), alpha=factor))


def dot(first: AnyDirection, second: AnyDirection) -> Tensor:
    """``<first, second>`` over all tensors. Scalar."""
    products = torch._foreach_mul(tensors(first), tensors(second))
    return torch.stack([product.sum() for product in products]).sum()


def norm(direction: AnyDirection) -> Tensor:
    """Euclidean length over all tensors together, at least the dtype's smallest normal number. Scalar."""
    lengths = torch.stack(torch._foreach_norm(tensors(direction)))
    return torch.linalg.vector_norm(lengths).clamp_min(torch.finfo(lengths.dtype).tiny)
