"""Label Gradient Alignment (Jackson, Schulman)."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from fastmeta import checks
from fastmeta.derivatives import LabelGradient
from fastmeta.directions import NormalizedGap
from fastmeta.methods.base import Batch, Method
from fastmeta.presets import label_gradient_alignment as presets
from fastmeta.problem import Refined
from fastmeta.updates import LabelTable


class LabelGradientAlignment(Method):
    r"""Learned labels under which the unlabeled gradient agrees with the labeled one (Algorithm 1).

    .. math:: g_w = \nabla_w \sum_k \frac{(\mathrm{EMA}(g_l) - g_u)_k^2}{\epsilon + \sqrt{\mathrm{EMA}(v_k^4)}},
        \qquad v = \mathrm{EMA}(g_l) - g_u, \quad y = \mathrm{softmax}(w)

    over weight and bias of the last layer (Eq. (2)); averages are constants. Each unlabeled example keeps its label
    logits w, initially 0, which Masked Adam updates when the example is sampled. The returned labels are those before
    the update, as in Algorithm 1; the imputed labels are not used.

    Args:
        num_examples: M, size of the unlabeled set.
        num_classes: C.
        lr: learning rate of Masked Adam on w.
        decay: of the average of the labeled gradient.
        decay_norm: of the average of ``v^4``.
        epsilon: added to the scale of each coordinate.
        labeled_weight: T(i), the weight of the labeled loss at step i = 0, 1, ...; ``Refined.loss`` then is
            ``(T(i) - 1) CE(labeled)``, which makes the loop's own labeled loss weigh T(i). None: T = 1.
        dtype: of the table.

    Raises:
        ValueError: a number is out of its range.
    """

    counters = ("calls",)

    def __init__(
        self,
        num_examples: int,
        num_classes: int,
        *,
        lr: float = 0.01,
        decay: float = 0.99,
        decay_norm: float = 0.99,
        epsilon: float = 1e-3,
        labeled_weight: Callable[[int], float] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        gap = NormalizedGap(
            decay=checks.number(decay, "decay", low=0.0, high=1.0),
            decay_norm=checks.number(decay_norm, "decay_norm", low=0.0, high=1.0),
            epsilon=checks.number(epsilon, "epsilon", low=0.0),
        )
        self._labels = LabelTable(num_examples, num_classes, lr=lr, dtype=dtype)
        self.labeled_weight = labeled_weight
        self.calls = 0
        super().__init__(gap, LabelGradient(loss="cross_entropy"), self._labels)

    @property
    def label_logits(self) -> Tensor:
        """The table w ``[M, C]``; ``softmax`` of it are the labels."""
        return self._labels.table.values

    @classmethod
    def from_preset(
        cls, name: Literal["paper"], num_examples: int, num_classes: int, **overrides: Any
    ) -> "LabelGradientAlignment":
        """The settings that the paper prints; there is no published code. ``overrides`` are constructor arguments.

        Raises:
            ValueError: unknown preset.
            TypeError: unknown override.

        >>> LabelGradientAlignment.from_preset("paper", 100, 10).label_logits.shape
        torch.Size([100, 10])
        """
        return cls(num_examples, num_classes, **{**asdict(presets.preset(name)), **overrides})

    def _finish(self, computed: Refined | Tensor, imputed: Tensor, batch: Batch) -> Refined:
        refined = super()._finish(computed, imputed, batch)
        weight = 1.0 if self.labeled_weight is None else self.labeled_weight(self.calls)
        self.calls += 1
        if weight == 1.0:
            return refined
        rows, targets = batch["holdout"], batch["targets"]
        if batch["labeled"] is not None:
            rows, targets = batch["labeled"], batch["labeled_targets"]
        logits = rows.logits.to(refined.labels.dtype)
        if targets.is_floating_point():
            targets = targets.to(logits.dtype)
        return refined._replace(loss=(weight - 1) * functional.cross_entropy(logits, targets))

    def state_dict(self) -> dict[str, Any]:
        """Table, moments, averages and the number of calls."""
        return {**super().state_dict(), "calls": self.calls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`state_dict`; refining then goes on bit for bit.

        Raises:
            ValueError: a tensor is missing or of another shape.
        """
        super().load_state_dict(state)
        self.calls = state["calls"]
