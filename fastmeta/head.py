"""The last linear layer in place of its logits."""

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional

from fastmeta.dispatch import in_own_dtype


class Head(NamedTuple):
    """Weight and bias of the last linear layer, given to an operator in place of ``logits``.

    The logits ``f = h W^T + b`` are then computed inside: of a large head for some rows at a time.
    """

    weight: Tensor  # [C, D]
    bias: Tensor | None = None  # [C]

    @in_own_dtype
    def logits(self, features: Tensor) -> Tensor:
        """``h W^T + b``. ``[N, C]``."""
        return functional.linear(features, self.weight, self.bias)
