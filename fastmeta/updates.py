"""Updates: what is done with the gradient of the outer loss?

An update supplies the labels and example weights that the step starts from, and turns the gradient with respect to one
of them into :class:`Refined`.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastmeta import losses
from fastmeta.ops.finite_difference_labels import project_to_simplex_rows
from fastmeta.ops.masked_adam_table import MaskedAdamTable, TableOptimizer
from fastmeta.ops.process_group import Group, sum_over, world_size
from fastmeta.problem import Problem
from fastmeta.state import Number, Stateful

Takes = Literal["labels", "weights", "labels and weights"]


class Refined(NamedTuple):
    """What a method gives back to the training loop."""

    labels: Tensor  # [N, C], detached
    weights: Tensor  # [N], detached
    loss: Tensor  # scalar, to be added to the loss of the step


def _unchanged(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of 1 and no extra loss."""
    return labels.new_ones(labels.shape[0]), labels.new_zeros(())


class Update(Stateful):
    """An update without state. Subclasses with a table override :meth:`labels` or :meth:`weights`."""

    takes: Takes = "labels"
    """what the gradient is with respect to; weights beside labels are its last column"""
    needs_index = False
    """whether it has a table"""
    needs_graph = False
    """whether the imputed labels must be on the graph"""

    def enter(self, problem: Problem) -> Problem:
        """The problem of the step as this update has it, where its weights are made from the problem's losses."""
        return problem

    def labels(self, imputed: Tensor, index: Tensor | None) -> Tensor:
        """Labels at the start of the step ``[N, C]``."""
        return imputed

    def weights(self, imputed: Tensor, index: Tensor | None) -> Tensor | None:
        """Example weights at the start of the step ``[N]``; None means 1."""
        return None

    def forward(self, gradient: Tensor, labels: Tensor, index: Tensor | None) -> Refined:
        """Use the gradient.

        Args:
            gradient: ``dG/dz [N, C]`` or ``dG/dw [N]``.
            labels: those of :meth:`labels`, on the graph where :attr:`needs_graph` is set.
            index: places of the examples in the unlabeled set ``[N]``.
        """
        raise NotImplementedError


class LabelStep(Update):
    """``z - step dG/dz``, with projection: clipped at 0 and divided by the row sum.

    Learning to Impute, Eq. (5) of the appendix; Meta-Gradient, Eq. (6). Neither prints the projection; the code of
    Meta-Gradient makes it.

    Args:
        step: size of the step on the labels.
        project: whether the result is brought back to a probability; a row left all 0 becomes uniform.

    >>> LabelStep(step=1.0)(torch.tensor([[0.5, -0.5]]), torch.tensor([[0.5, 0.5]]), None).labels
    tensor([[0., 1.]])
    """

    step = Number(low=None)

    def __init__(self, *, step: float, project: bool = True) -> None:
        super().__init__()
        self.step = step
        self.project = project

    def forward(self, gradient: Tensor, labels: Tensor, index: Tensor | None) -> Refined:
        """Labels after the step, weights 1, loss 0."""
        moved = labels - self.step * gradient
        return Refined(project_to_simplex_rows(moved) if self.project else moved, *_unchanged(labels))


class LabelLogitStep(Update):
    """``softmax(q - step dG/dq)`` with ``z = softmax(q)``, so that labels stay probabilities.

    The published code of Learning to Impute, variant "L".

    Args:
        step: size of the step on the logits of the labels.

    >>> LabelLogitStep(step=4.0)(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]]), None).labels
    tensor([[0.1192, 0.8808]])
    """

    step = Number(low=None)

    def __init__(self, *, step: float) -> None:
        super().__init__()
        self.step = step

    def forward(self, gradient: Tensor, labels: Tensor, index: Tensor | None) -> Refined:
        """Labels after the step, weights 1, loss 0."""
        moved = labels.log() - self.step * losses.softmax_jacobian(labels, gradient)
        return Refined(moved.softmax(-1), *_unchanged(labels))


class PullBack(Update):
    """``loss = weight sum_i <dG/dz_i, z_i>`` with z on the graph: its gradient pulls dG/dz back through the imputer.

    Learning to Impute, Eq. (V2). The labels themselves stay.

    Args:
        weight: of the surrogate.
        process_group: processes that the batch is spread over. The surrogate is multiplied by their number, because
            DistributedDataParallel averages the gradients of what is a sum over all examples.
    """

    needs_graph = True
    weight = Number(low=None)

    def __init__(self, *, weight: float = 1.0, process_group: Group = None) -> None:
        super().__init__()
        self.weight = weight
        self.processes = world_size(process_group)

    def forward(self, gradient: Tensor, labels: Tensor, index: Tensor | None) -> Refined:
        """The labels as they were, weights 1, and the surrogate."""
        with torch.enable_grad():
            loss = self.weight * self.processes * (gradient.detach() * labels).sum()
        kept = labels.detach()
        return Refined(kept, kept.new_ones(kept.shape[0]), loss)


def _count(value: object, name: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")
    return value


class _TableUpdate(Update):
    needs_index = True
    table: MaskedAdamTable

    @property
    def lr(self) -> float:
        """Learning rate of the table; may be changed between calls."""
        return self.table.lr

    @lr.setter
    def lr(self, value: float) -> None:
        self.table.lr = value


class WeightTable(_TableUpdate):
    """A weight for each unlabeled example, initially 1, stepped by Masked Adam and clipped.

    Args:
        num_examples: M, size of the unlabeled set.
        lr: learning rate.
        optimizer: see :class:`fastmeta.ops.masked_adam_table.MaskedAdamTable`.
        low: smallest weight.
        high: largest weight.
        read: ``before`` the update or ``after`` it: which weights the current step uses.
        duplicates: of an example that comes twice in a batch, ``sum`` the gradients or use the ``last`` one.
        dtype: of the table.
        process_group: see :class:`fastmeta.ops.masked_adam_table.MaskedAdamTable`.
        sharded: see there.
    """

    takes: Takes = "weights"

    def __init__(
        self,
        num_examples: int,
        *,
        lr: float = 0.01,
        optimizer: TableOptimizer = "masked_adam",
        low: float = 0.0,
        high: float = 2.0,
        read: str = "before",
        duplicates: Literal["sum", "last"] = "sum",
        dtype: torch.dtype = torch.float32,
        process_group: Group = None,
        sharded: bool = False,
    ) -> None:
        if read not in ("before", "after"):
            raise ValueError(f"read must be 'before' or 'after', got {read!r}")
        super().__init__()
        values = torch.ones((), dtype=dtype).expand(_count(num_examples, "num_examples", 1))
        self.table = MaskedAdamTable(
            values,
            lr=lr,
            optimizer=optimizer,
            low=low,
            high=high,
            duplicates=duplicates,
            process_group=process_group,
            sharded=sharded,
        )
        self.read = read

    def weights(self, imputed: Tensor, index: Tensor | None) -> Tensor:
        """The table's rows ``[N]``."""
        assert index is not None, "needs_index"
        return self.table.rows(index).to(imputed.dtype)

    def forward(self, gradient: Tensor, labels: Tensor, index: Tensor | None) -> Refined:
        """The labels as they were, and the weights."""
        before = self.weights(labels, index) if self.read == "before" else None
        self._step(gradient, index)
        weights = self.weights(labels, index) if before is None else before
        return Refined(labels, weights, labels.new_zeros(()))

    def _step(self, gradient: Tensor, index: Tensor | None) -> None:
        assert index is not None, "needs_index"
        self.table.step_(index, gradient)


class SharedWeight(WeightTable):
    """One weight for all unlabeled examples: a table of one row, whose gradient is the sum over the batch.

    Not All Unlabeled Data Are Equal, Section 4.3, "Tuning a Single Weight": ``lambda`` of Eq. (1).

    Args:
        lr: learning rate.
        optimizer: ``masked_adam``, which here is Adam, or ``sgd``.
        low: smallest weight.
        high: largest weight.
        read: ``before`` the update or ``after`` it: which weight the current step uses.
        process_group: processes that the batch is spread over; the sum runs over all of them.
        dtype: of the weight.
    """

    needs_index = False

    def __init__(
        self,
        *,
        lr: float = 0.01,
        optimizer: TableOptimizer = "masked_adam",
        low: float = 0.0,
        high: float = 2.0,
        read: str = "before",
        process_group: Group = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(1, lr=lr, optimizer=optimizer, low=low, high=high, read=read, dtype=dtype)
        self.process_group = process_group

    def weights(self, imputed: Tensor, index: Tensor | None) -> Tensor:
        """The weight, once for each example ``[N]``."""
        self.table.to(imputed.device)
        return self.table.values.to(imputed.dtype, copy=True).expand(len(imputed))

    def _step(self, gradient: Tensor, index: Tensor | None) -> None:
        (total,) = sum_over([gradient.sum().view(1)], self.process_group)
        self.table.step_(torch.zeros_like(total, dtype=torch.int64), total)


class PullBackAndWeights(WeightTable):
    """:class:`PullBack` of the labels and :class:`WeightTable` of the example weights, of one gradient ``[N, C + 1]``.

    Args:
        num_examples: M, size of the unlabeled set.
        weight: of the surrogate.
        process_group: see :class:`PullBack`.
        table: see :class:`WeightTable`.
    """

    takes = "labels and weights"
    needs_graph = True

    def __init__(self, num_examples: int, *, weight: float = 1.0, process_group: Group = None, **table: Any) -> None:
        super().__init__(num_examples, process_group=process_group, **table)
        self.pull_back = PullBack(weight=weight, process_group=process_group)

    @property
    def weight(self) -> float:
        """Of the surrogate."""
        return self.pull_back.weight

    @weight.setter
    def weight(self, value: float) -> None:
        self.pull_back.weight = value

    def forward(self, gradient: Tensor, labels: Tensor, index: Tensor | None) -> Refined:
        """The labels as they were, the weights, and the surrogate of the labels."""
        wanted = len(labels), labels.shape[1] + 1
        if gradient.shape != wanted:
            raise ValueError(
                f"{type(self).__name__} takes a gradient [N, C + 1] = {list(wanted)}, got {list(gradient.shape)}"
            )
        kept, _, loss = self.pull_back(gradient[:, :-1], labels, index)
        # A weight's step is finite where that of its labels is.
        of_weights = gradient[:, -1] + (gradient[:, :-1] * 0).sum(1)
        return super().forward(of_weights, kept, index)._replace(loss=loss)


class LabelTable(_TableUpdate):
    """Parameters w of the labels of each unlabeled example, initially 0, stepped by Masked Adam.

    Label Gradient Alignment, Algorithm 1: ``y = softmax(w)`` for classification, where the gradient with respect to w
    is ``J_y dG/dy``, and ``y = w`` for regression.

    Args:
        num_examples: M, size of the unlabeled set.
        num_classes: C.
        lr: learning rate.
        optimizer: see :class:`fastmeta.ops.masked_adam_table.MaskedAdamTable`.
        parameterization: ``softmax`` (labels start uniform) or ``identity`` (labels start at 0).
        dtype: of the table.
        process_group: see :class:`fastmeta.ops.masked_adam_table.MaskedAdamTable`.
        sharded: see there.
    """

    def __init__(
        self,
        num_examples: int,
        num_classes: int,
        *,
        lr: float = 0.01,
        optimizer: TableOptimizer = "masked_adam",
        parameterization: Literal["softmax", "identity"] = "softmax",
        dtype: torch.dtype = torch.float32,
        process_group: Group = None,
        sharded: bool = False,
    ) -> None:
        if parameterization not in ("softmax", "identity"):
            raise ValueError(f"parameterization must be 'softmax' or 'identity', got {parameterization!r}")
        super().__init__()
        shape = _count(num_examples, "num_examples", 1), _count(num_classes, "num_classes", 1)
        values = torch.zeros((), dtype=dtype).expand(shape)
        self.table = MaskedAdamTable(values, lr=lr, optimizer=optimizer, process_group=process_group, sharded=sharded)
        self.parameterization = parameterization

    def labels(self, imputed: Tensor, index: Tensor | None) -> Tensor:
        """The labels of the table's rows ``[N, C]``; the imputed labels only say the shape."""
        assert index is not None, "needs_index"
        rows = self.table.rows(index)
        if rows.shape != imputed.shape:
            raise ValueError(f"num_classes is {rows.shape[1]}, but logits are {list(imputed.shape)}")
        rows = rows.to(imputed.dtype)
        return rows.softmax(-1) if self.parameterization == "softmax" else rows

    def forward(self, gradient: Tensor, labels: Tensor, index: Tensor | None) -> Refined:
        """The labels of this step; the table holds those of the next."""
        assert index is not None, "needs_index"
        if self.parameterization == "softmax":
            gradient = losses.softmax_jacobian(labels, gradient)
        self.table.step_(index, gradient)
        return Refined(labels, *_unchanged(labels))
