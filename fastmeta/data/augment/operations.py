"""Which operations an image draws, and how strong."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fastmeta.data.augment.pixels import constant
from fastmeta.data.random_numbers import KeyedRandom


def draw_operations(
    random: KeyedRandom, limits: Mapping[str, float], *, per_image: int, strength: float, device: torch.device
) -> dict[str, Tensor]:
    """Strengths ``[n]`` of every operation: uniform in [-limit, limit] for those an image draws, 0 for the rest.

    Args:
        random: ``[n]`` keys; two numbers an operation are drawn.
        limits: of each operation.
        per_image: how many operations an image draws.
        strength: multiplies the limits.
        device: of the result.
    """
    drawn = random.uniform(2 * len(limits)).to(device)
    order, values = drawn.split(len(limits), dim=1)
    values = (2 * values - 1) * (constant(tuple(limits.values()), device) * strength)
    chosen = torch.zeros_like(values).scatter_(1, order.topk(per_image).indices, 1.0)
    return dict(zip(limits, (values * chosen).unbind(dim=1), strict=True))
