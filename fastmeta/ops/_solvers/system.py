"""The damped Hessian as a linear operator on ``[C, K]`` matrices."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastmeta.losses import LOSSES
from fastmeta.ops import hvp
from fastmeta.ops._solvers.joined import Joined


class DampedHessian:
    """``X -> H X + damping X`` for the rows ``g_i`` of ``features``.

    Args:
        features: rows ``g_i`` with weight and bias input folded in, ``[N, K]``.
        logits: ``[N, C]``.
        signs: signs of the example weights ``[N]``; None if all are positive.
        loss: name of the loss.
        damping: added multiple of the identity.
        impl: implementation of the Hessian-vector product.
        joined: the processes whose rows make up the system; None if these are all rows.
    """

    def __init__(
        self,
        features: Tensor,
        logits: Tensor,
        signs: Tensor | None,
        loss: str,
        damping: float,
        impl: str | None,
        joined: Joined | None = None,
    ) -> None:
        self.features = features
        self.logits = logits
        self.signs = signs
        self.loss = loss
        self.damping = damping
        self._kernel: Callable[..., Any] | None = hvp.OPERATOR.select(impl, features, logits, signs)
        self.impl = impl
        self.joined = joined

    @property
    def num_rows(self) -> int:
        """``N``, of all processes."""
        return self.logits.shape[0] if self.joined is None else self.joined.count

    @property
    def may_be_indefinite(self) -> bool:
        """Whether a weight is negative; on a GPU, whether there are weights."""
        return self.signs is not None if self.joined is None else self.joined.negative

    @property
    def num_unknowns(self) -> tuple[int, int]:
        """``(C, K)``."""
        return self.logits.shape[1], self.features.shape[1]

    def __call__(self, direction: Tensor) -> Tensor:
        """``(H + damping I) V``. ``[C, K]``."""
        if self.joined is None:
            return self._of_own_rows(direction, self.damping)
        return self.joined.sum(self._of_own_rows(direction, 0.0))[0].add_(direction, alpha=self.damping)

    def carry(self, direction: Tensor, number: Tensor | float) -> tuple[Tensor, Tensor]:
        """``(H + damping I) V`` and, in the same all-reduce, the sum of a small integer over the processes."""
        assert self.joined is not None
        image, total = self.joined.sum(self._of_own_rows(direction, 0.0), direction.new_zeros(()).add_(number))
        return image.add_(direction, alpha=self.damping), total

    def _of_own_rows(self, direction: Tensor, damping: float) -> Tensor:
        if self._kernel is not None:
            code = LOSSES[self.loss]
            return self._kernel(self.features, self.logits, direction, None, self.signs, code, damping)[0]
        return hvp.hessian_vector_product_reference(
            self.features, self.logits, direction, None, self.signs, self.loss, damping
        )[0]

    def with_features(self, features: Tensor) -> "DampedHessian":
        """The same examples with their rows in another basis, ``[N, r]``."""
        return DampedHessian(features, self.logits, self.signs, self.loss, self.damping, self.impl, self.joined)


def fold(weight: Tensor, bias: Tensor | None, *, padded: bool = False) -> Tensor:
    """Weight ``[C, D]`` and bias ``[C]`` side by side: ``[C, K]``; with zeros up to a multiple of 16 if ``padded``.

    A GPU reads rows that start at multiples of 16 bytes in whole words; a zero column is an unknown that stays 0.
    """
    if bias is None:
        return weight
    padding = [weight.new_zeros(len(weight), -(weight.shape[1] + 1) % 16)] if padded else []
    return torch.cat([weight, bias.unsqueeze(1), *padding], dim=1)


def rows(
    features: Tensor, weights: Tensor | None, bias: bool, *, on_device: bool = False
) -> tuple[Tensor, Tensor | None]:
    """``g_i = sqrt(|w_i|) [h_i, 1]`` ``[N, K]`` and the signs of the weights, None if all are positive ``[N]``.

    ``on_device``: padded like :func:`fold`, and nothing waits for the device to know whether a weight is negative.
    """
    g = fold(features, features.new_ones(len(features)), padded=on_device) if bias else features
    if weights is None:
        return g, None
    g = g * weights.abs().sqrt().unsqueeze(1)
    return g, weights.sign() if on_device or bool((weights < 0).any()) else None
