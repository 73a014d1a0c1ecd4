"""Whether a step is finite, known where the gradients are: nobody waits for a GPU to tell."""

from collections.abc import Sequence

import torch
from torch import Tensor


def found_inf(gradients: Sequence[Tensor], power: int) -> Tensor:
    """Whether a power of the gradients' length is not finite: then a step along them would leave NaN or infinity.

    Args:
        gradients: of any shapes, at least one.
        power: that a moment is kept of, 2 or 4.

    Returns:
        A scalar on the first one's device: 0, or NaN where it is not finite. As the ``found_inf`` of a loss scaler it
        is told from 0 by ``bool``.

    >>> found_inf([torch.ones(2), torch.zeros(3, 0)], 2), found_inf([torch.tensor([1.0, torch.inf])], 2)
    (tensor(0.), tensor(nan))
    """
    first = gradients[0]
    wide = torch.float64 if first.dtype == torch.float64 else torch.float32
    if len(gradients) > 1 and not first.is_cpu:  # few launches
        lengths = torch._foreach_norm(list(gradients), 2, wide)
        gradients = [torch.stack([one if one.device == first.device else one.to(first.device) for one in lengths])]
    squares: Tensor | None = None
    for gradient in gradients:
        flat = gradient.reshape(-1)
        if flat.dtype != wide:
            flat = flat.to(wide)
        square = flat.dot(flat)
        squares = square if squares is None else squares + square
    assert squares is not None, "at least one"
    total = squares if power == 2 else squares * squares
    return total - total
