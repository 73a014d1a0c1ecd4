"""What a call of the last linear layer gave, and the layer in place of its logits."""

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional

from fastmeta.dispatch import in_own_dtype


class Outputs(NamedTuple):
    """Features and logits of the last linear layer, ``logits = features weight^T + bias``, or that plus a constant.

    The constant is what does not move with the layer: a frozen bias, the frozen layer that a LoRA adapter adds to. No
    derivative sees it, but ``weight`` and ``bias`` do not give the logits then, so ``weight`` is None; in place of a
    :class:`fastmeta.Head`, give operators the logits themselves.
    """

    features: Tensor  # [N, D], detached
    logits: Tensor  # [N, C], on the graph
    weight: Tensor | None  # [C, D], detached, that the forward used
    bias: Tensor | None  # [C], detached; None: no bias, or one that does not move


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
