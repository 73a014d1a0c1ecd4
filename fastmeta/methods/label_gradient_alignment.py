"""Label Gradient Alignment (Jackson, Schulman)."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from fastmeta import checks, losses
from fastmeta.derivatives import How, LabelGradient
from fastmeta.directions import NormalizedGap
from fastmeta.methods.base import Method
from fastmeta.methods.batch import Batch, as_outputs
from fastmeta.ops.masked_adam_table import TableOptimizer
from fastmeta.ops.process_group import Group
from fastmeta.problem import Reduction
from fastmeta.problem.targets import check_targets, read
from fastmeta.state import PartNumber
from fastmeta.updates import LabelTable, Refined


@dataclass(frozen=True)
class LabelGradientAlignmentPreset:
    """Arguments of :class:`fastmeta.LabelGradientAlignment`."""

    lr: float
    epsilon: float
    labeled_weight: Callable[[int], float] | None = None


def inverse_ramp(step: int, *, length: int) -> float:
    """``T(i) = exp(5 (1 - t)^2)``, ``t = min(1, i / length)``: from 148 to 1.

    >>> round(inverse_ramp(0, length=10)), inverse_ramp(10, length=10)
    (148, 1.0)
    """
    remaining = 1 - min(1.0, step / length)
    return math.exp(5 * remaining * remaining)


# There is no published code, and the paper prints neither decays nor T(i) nor the settings of its image experiments
# ("tuned").
PRESETS = {
    # Figure 1, linear regression: alpha_w = epsilon_norm = 1e-3, no T(i).
    "paper": LabelGradientAlignmentPreset(lr=1e-3, epsilon=1e-3),
    # Section 4 takes over the harness of Oliver et al. (2018): Adam at 3e-3, and a coefficient of the unlabeled loss
    # that rises as exp(-5 (1 - t)^2) for 200,000 steps. Adam is blind to the scale of the whole loss, so that
    # coefficient is T(i) = exp(5 (1 - t)^2) on the labeled loss. The harness has no epsilon: Figure 1's.
    "realistic": LabelGradientAlignmentPreset(
        lr=3e-3, epsilon=1e-3, labeled_weight=partial(inverse_ramp, length=200_000)
    ),
}


def preset(name: str) -> LabelGradientAlignmentPreset:
    """Settings of the ``paper``, or of the ``realistic`` evaluation that it follows.

    >>> preset("paper").epsilon, preset("realistic").lr
    (0.001, 0.003)
    """
    return checks.preset(PRESETS, name, "LabelGradientAlignment")


@dataclass(frozen=True, eq=False)
class ScheduledBatch(Batch):
    """A batch with the loop's own logits of its labeled examples."""

    labeled_logits: Tensor | None = None

    def check(self, how: str, needs_index: bool, learns: bool, method: str) -> None:
        """See :meth:`Batch.check`."""
        super().check(how, needs_index, learns, method)
        if self.labeled_logits is not None:
            name = "targets" if self.labeled_targets is None else "labeled_targets"
            check_targets(getattr(self, name), checks.matrix(self.labeled_logits, "labeled_logits", "[N, C]"), name)

    def check_labeled_logits(self) -> None:
        """Raise unless the logits whose loss T(i) multiplies are on the graph."""
        name, logits = "labeled_logits", self.labeled_logits
        if logits is None:
            name = "holdout" if self.labeled is None else "labeled"
            logits = as_outputs(getattr(self, name), name).logits
        if not logits.requires_grad:
            raise ValueError(
                f"{name} must have logits on the graph with labeled_weight, got a tensor without one (of "
                "torch.no_grad, inference_mode or detach): the loss of the labeled examples is trained on them"
            )


class LabelGradientAlignment(Method):
    r"""Learned labels under which the unlabeled gradient agrees with the labeled one (Algorithm 1).

    .. math:: g_w = \nabla_w \sum_k \frac{(\mathrm{EMA}(g_l) - g_u)_k^2}{\epsilon + \sqrt{\mathrm{EMA}(v_k^4)}},
        \qquad v = \mathrm{EMA}(g_l) - g_u, \quad y = \mathrm{softmax}(w)

    over the last layer or the whole model (Eq. (2)); averages are constants. Each unlabeled example keeps its label
    logits w, initially 0, and Masked Adam updates those of the examples that are sampled; with ``optimizer="adam"``, as
    Algorithm 1 prints it, their moments go on to move the others. The returned labels are those before the update, as
    in Algorithm 1; imputed labels are not used.
    What the paper leaves open is an argument here.

    Args:
        num_examples: M, size of the unlabeled set.
        num_classes: C, classes or outputs.
        how: ``last_layer``: over its weight and bias, in closed form; else over the whole model, and how its derivative
            is taken, see :func:`fastmeta.label_gradient`. :meth:`refine` then needs the model.
        radius: length of the perturbation of a difference.
        mode: of the model in the method's own passes, ``train`` (BatchNorm takes the statistics of each batch) or
            ``eval``; None: as it stands.
        inner_loss: of both gradients; ``cross_entropy``, or ``mse`` for regression, where ``y = w``.
        reduction: of both losses over their examples.
        lr: learning rate of w.
        optimizer: of w: ``masked_adam``; ``adam``, for which the examples that are not sampled have a gradient of 0; or
            ``sgd`` (Eq. (11)).
        decay: of the average of the labeled gradient.
        decay_norm: of the average of ``v^4``.
        epsilon: added to the scale of each coordinate.
        include_current: whether the averages of a step include its own batch.
        labeled_weight: T(i), the weight of the labeled loss at step i = 0, 1, ...; ``Refined.loss`` then is
            ``(T(i) - 1) L(labeled)``, which makes the loop's own labeled loss weigh T(i). None: T = 1, or a loop that
            scales its own loss.
        process_group: processes that the batch is spread over: a step is that on the joined batch, and every process
            has the complete table.
        sharded: a process keeps the rows i of the table with ``i % processes`` its rank alone; reading them, also by
            ``state_dict``, is then a call that every process makes.
        dtype: of the table.

    Raises:
        ValueError: an option is not one of those named, or a number is out of its range.
    """

    counts = True
    update: LabelTable
    lr = PartNumber("update", "lr")

    def __init__(
        self,
        num_examples: int,
        num_classes: int,
        *,
        how: How = "last_layer",
        radius: float = 0.01,
        mode: Literal["train", "eval"] | None = None,
        inner_loss: Literal["cross_entropy", "mse"] = "cross_entropy",
        reduction: Reduction = "mean",
        lr: float = 0.01,
        optimizer: TableOptimizer = "masked_adam",
        decay: float = 0.99,
        decay_norm: float = 0.99,
        epsilon: float = 1e-3,
        include_current: bool = True,
        labeled_weight: Callable[[int], float] | None = None,
        process_group: Group = None,
        sharded: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        checks.choice(inner_loss, "inner_loss", "cross_entropy", "mse")
        checks.choice(reduction, "reduction", "mean", "sum")
        if mode is not None:
            checks.choice(mode, "mode", "train", "eval")
        gap = NormalizedGap(
            decay=checks.number(decay, "decay", low=0.0, high=1.0),
            decay_norm=checks.number(decay_norm, "decay_norm", low=0.0, high=1.0),
            epsilon=checks.number(epsilon, "epsilon", low=0.0),
            loss=inner_loss,
            reduction=reduction,
            include_current=include_current,
        )
        update = LabelTable(
            num_examples,
            num_classes,
            lr=lr,
            optimizer=optimizer,
            parameterization="softmax" if inner_loss == "cross_entropy" else "identity",
            dtype=dtype,
            process_group=process_group,
            sharded=sharded,
        )
        self.inner_loss = inner_loss
        self.reduction = reduction
        self.mode = mode
        self.labeled_weight = labeled_weight
        gradient = LabelGradient(inner_loss, reduction=reduction, how=how, radius=radius)
        super().__init__(gap, gradient, update, process_group=process_group)

    @property
    def label_logits(self) -> Tensor:
        """The table w ``[M, C]``; ``softmax`` of it are the labels (in a regression w itself)."""
        return self.update.table.complete()

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
        return cls(num_examples, num_classes, **{**asdict(preset(name)), **overrides})

    def refine(self, *, labeled_logits: Tensor | None = None, **batch: Any) -> Refined:
        """See :meth:`fastmeta.Method.refine`; ``index`` is needed.

        The labeled examples are ``labeled``, or else ``holdout``; ``labels`` are not used, and ``holdout_gradient`` is
        the labeled gradient.

        Args:
            labeled_logits: with ``model`` and ``labeled_weight``: the loop's own logits of the labeled examples
                ``[Nl, C]``, on the graph, so that no forward is run for T(i) alone.
            batch: the arguments of :meth:`fastmeta.Method.refine`.
        """
        given = ScheduledBatch(labeled_logits=labeled_logits, **batch)
        if self.labeled_weight is not None:
            if given.model is not None and labeled_logits is None:
                raise ValueError("labeled_logits are needed with model and labeled_weight: the loop's own")
            if given.targets is None and given.labeled_targets is None:
                raise ValueError("targets are needed with labeled_weight, got None")
            given.check_labeled_logits()
        return self._refine(given)

    def _finish(self, computed: Refined | Tensor, imputed: Tensor, batch: Batch) -> Refined:
        assert isinstance(batch, ScheduledBatch), "made by refine"
        weight = 1.0 if self.labeled_weight is None else self.labeled_weight(self.calls)
        refined = super()._finish(computed, imputed, batch)
        if weight == 1.0:
            return refined
        examples, targets = batch.holdout, batch.targets
        if batch.labeled is not None:
            examples, targets = batch.labeled, batch.labeled_targets
        logits = as_outputs(examples, "holdout").logits if batch.labeled_logits is None else batch.labeled_logits
        assert targets is not None, "needed with labeled_weight"
        with torch.enable_grad():
            logits = logits.to(refined.labels.dtype)
            labeled = read(targets, logits, self.inner_loss)
            per_example = losses.loss_per_example(logits, labeled.targets, self.inner_loss)
            if labeled.weights is not None:
                per_example = per_example * labeled.weights
            total = per_example.sum()
            if self.reduction == "mean":
                total = per_example.mean() if labeled.weights is None else total / labeled.weights.sum().clamp_min(1)
            return refined._replace(loss=(weight - 1) * total)
