"""Which operations an image draws, and how strong."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fastmeta.data.augment.pixels import constant


def draw_operations(
    uniform: Tensor, limits: Mapping[str, float], *, per_image: int, strength: float
) -> dict[str, Tensor]:
    """Strengths ``[n]`` of every operation: uniform in [-limit, limit] for those an image draws, 0 for the rest.

    Args:
        uniform: ``[n, 2 * operations]`` random numbers in [0, 1).
        limits: of each operation.
        per_image: how many different operations an image draws.
        strength: multiplies the limits.
    """
    order, values = uniform.split(len(limits), dim=1)
    values = (2 * values - 1) * (constant(tuple(limits.values()), uniform.device) * strength)
    chosen = torch.zeros_like(values).scatter_(1, order.topk(per_image).indices, 1.0)
    return dict(zip(limits, (values * chosen).unbind(dim=1), strict=True))
