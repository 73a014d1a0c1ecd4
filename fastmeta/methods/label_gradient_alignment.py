"""Label Gradient Alignment (Jackson, Schulman)."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastmeta import checks, losses
from fastmeta.capture import Outputs
from fastmeta.derivatives import How, LabelGradient
from fastmeta.directions import NormalizedGap
from fastmeta.methods.arguments import choice
from fastmeta.methods.base import Batch, Method
from fastmeta.model_function import Inputs
from fastmeta.presets import label_gradient_alignment as presets
from fastmeta.problem import Reduction, Refined
from fastmeta.process_group import Group
from fastmeta.updates import LabelTable


class LabelGradientAlignment(Method):
    r"""Learned labels under which the unlabeled gradient agrees with the labeled one (Algorithm 1).

    .. math:: g_w = \nabla_w \sum_k \frac{(\mathrm{EMA}(g_l) - g_u)_k^2}{\epsilon + \sqrt{\mathrm{EMA}(v_k^4)}},
        \qquad v = \mathrm{EMA}(g_l) - g_u, \quad y = \mathrm{softmax}(w)

    over the last layer or the whole model (Eq. (2)); averages are constants. Each unlabeled example keeps its label
    logits w, initially 0, and Masked Adam updates those of the examples that are sampled: a dense Adam would go on to
    move the others. The returned labels are those before the update, as in Algorithm 1; imputed labels are not used.
    What the paper leaves open is an argument here.

    Args:
        num_examples: M, size of the unlabeled set.
        num_classes: C, classes or outputs.
        how: ``last_layer``: over its weight and bias, in closed form; else over the whole model, and how its derivative
            is taken, see :func:`fastmeta.label_gradient`. :meth:`refine` then needs the model.
        radius: length of the perturbation of a difference.
        mode: of the model in the method's own passes, ``train`` (BatchNorm takes the statistics of each batch) or
            ``eval``; None: as it stands.
        loss: of both gradients; ``cross_entropy``, or ``mse`` for regression, where ``y = w``.
        reduction: of both losses over their examples.
        lr: learning rate of Masked Adam on w.
        decay: of the average of the labeled gradient.
        decay_norm: of the average of ``v^4``.
        epsilon: added to the scale of each coordinate.
        include_current: whether the averages of a step include its own batch.
        labeled_weight: T(i), the weight of the labeled loss at step i = 0, 1, ...; ``Refined.loss`` then is
            ``(T(i) - 1) L(labeled)``, which makes the loop's own labeled loss weigh T(i). None: T = 1, or a loop that
            scales its own loss.
        process_group: processes that the batch is spread over, whose gradients are summed; each keeps the table rows of
            the examples it draws.
        dtype: of the table.

    Raises:
        ValueError: an option is not one of those named, or a number is out of its range.
    """

    counters = ("calls",)

    def __init__(
        self,
        num_examples: int,
        num_classes: int,
        *,
        how: How = "last_layer",
        radius: float = 0.01,
        mode: Literal["train", "eval"] | None = None,
        loss: Literal["cross_entropy", "mse"] = "cross_entropy",
        reduction: Reduction = "mean",
        lr: float = 0.01,
        decay: float = 0.99,
        decay_norm: float = 0.99,
        epsilon: float = 1e-3,
        include_current: bool = True,
        labeled_weight: Callable[[int], float] | None = None,
        process_group: Group = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        choice(loss, "loss", "cross_entropy", "mse")
        choice(reduction, "reduction", "mean", "sum")
        if mode is not None:
            choice(mode, "mode", "train", "eval")
        gap = NormalizedGap(
            decay=checks.number(decay, "decay", low=0.0, high=1.0),
            decay_norm=checks.number(decay_norm, "decay_norm", low=0.0, high=1.0),
            epsilon=checks.number(epsilon, "epsilon", low=0.0),
            loss=loss,
            reduction=reduction,
            include_current=include_current,
        )
        self._labels = LabelTable(
            num_examples,
            num_classes,
            lr=lr,
            parameterization="softmax" if loss == "cross_entropy" else "identity",
            dtype=dtype,
        )
        self.inner_loss = loss
        self.reduction = reduction
        self.mode = mode
        self.labeled_weight = labeled_weight
        self.calls = 0
        gradient = LabelGradient(loss, reduction=reduction, how=how, radius=radius)
        super().__init__(gap, gradient, self._labels, process_group=process_group)

    @property
    def label_logits(self) -> Tensor:
        """The table w ``[M, C]``; ``softmax`` of it are the labels (in a regression w itself)."""
        return self._labels.table.values

    @classmethod
    def from_preset(
        cls, name: Literal["paper", "realistic"], num_examples: int, num_classes: int, **overrides: Any
    ) -> "LabelGradientAlignment":
        """The settings that the paper prints, or those of the evaluation that it follows; there is no published code.

        ``overrides`` are arguments of the constructor.

        Raises:
            ValueError: unknown preset.
            TypeError: unknown override.

        >>> LabelGradientAlignment.from_preset("paper", 100, 10).label_logits.shape
        torch.Size([100, 10])
        """
        return cls(num_examples, num_classes, **{**asdict(presets.preset(name)), **overrides})

    def refine(
        self,
        *,
        unlabeled: Outputs | Inputs,
        holdout: Outputs | Inputs | None = None,
        targets: Tensor | None = None,
        index: Tensor | None = None,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        labeled: Outputs | Inputs | None = None,
        labeled_targets: Tensor | None = None,
        model: nn.Module | None = None,
        holdout_gradient: Mapping[str, Tensor] | None = None,
        labeled_logits: Tensor | None = None,
    ) -> Refined:
        """See :meth:`fastmeta.Method.refine`; ``index`` is needed.

        Args:
            unlabeled: the unlabeled examples.
            holdout: the labeled examples.
            targets: their labels.
            index: places of the unlabeled examples in the unlabeled set ``[N]``.
            labels: not used.
            mask: 0 for an unlabeled example that the training loss leaves out, else 1, ``[N]``.
            labeled: the labeled examples, in place of ``holdout``.
            labeled_targets: their labels.
            model: takes the examples as inputs.
            holdout_gradient: the labeled gradient by parameter name, where the loop has taken it already.
            labeled_logits: with ``model`` and ``labeled_weight``: the loop's own logits of the labeled examples
                ``[Nl, C]``, on the graph, so that no forward is run for T(i) alone.
        """
        if self.labeled_weight is not None:
            if model is not None and labeled_logits is None:
                raise ValueError("labeled_logits are needed with model and labeled_weight: the loop's own")
            if targets is None and labeled_targets is None:
                raise ValueError("targets are needed with labeled_weight, got None")
        return self._refine(
            {
                "unlabeled": unlabeled,
                "holdout": holdout,
                "targets": targets,
                "index": index,
                "labels": labels,
                "mask": mask,
                "labeled": labeled,
                "labeled_targets": labeled_targets,
                "model": model,
                "holdout_gradient": holdout_gradient,
                "labeled_logits": labeled_logits,
            }
        )

    def _finish(self, computed: Refined | Tensor, imputed: Tensor, batch: Batch) -> Refined:
        refined = super()._finish(computed, imputed, batch)
        weight = 1.0 if self.labeled_weight is None else self.labeled_weight(self.calls)
        self.calls += 1
        if weight == 1.0:
            return refined
        own = "holdout" if batch["labeled"] is None else "labeled"
        logits = batch[own].logits if batch["labeled_logits"] is None else batch["labeled_logits"]
        targets = batch["targets" if own == "holdout" else "labeled_targets"]
        logits = logits.to(refined.labels.dtype)
        targets = losses.as_probabilities(targets, logits.shape[1], logits.dtype).to(logits.dtype)
        per_example = losses.loss_per_example(logits, targets, self.inner_loss)
        total = per_example.mean() if self.reduction == "mean" else per_example.sum()
        return refined._replace(loss=(weight - 1) * total)

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
