"""Updates: what is done with the gradient of the outer loss?

An update supplies the labels and example weights that the step starts from, and turns the gradient with respect to one
of them into :class:`fastmeta.problem.Refined`.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from fastmeta import checks, losses, ops
from fastmeta.ops.finite_difference_labels import project_to_simplex_rows
from fastmeta.problem import Refined


def _unchanged(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of 1 and no extra loss."""
    return labels.new_ones(labels.shape[0]), labels.new_zeros(())


class Update:
    """An update without state. Subclasses with a table override :meth:`labels` or :meth:`weights`."""

    takes: Literal["labels", "weights"] = "labels"
    """what the gradient is with respect to"""
    needs_index = False
    """whether it has a table"""
    needs_graph = False
    """whether the imputed labels must be on the graph"""

    def labels(self, imputed: Tensor, index: Tensor | None) -> Tensor:
        """Labels at the start of the step ``[N, C]``."""
        return imputed

    def weights(self, imputed: Tensor, index: Tensor | None) -> Tensor | None:
        """Example weights at the start of the step ``[N]``; None means 1."""
        return None

    def apply(self, gradient: Tensor, labels: Tensor, index: Tensor | None) -> Refined:
        """Use the gradient.

        Args:
            gradient: ``dG/dz [N, C]`` or ``dG/dw [N]``.
            labels: those of :meth:`labels`, on the graph where :attr:`needs_graph` is set.
            index: places of the examples in the unlabeled set ``[N]``.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Everything :meth:`load_state_dict` needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`state_dict`."""


class LabelStep(Update):
    """``z - step dG/dz``, with projection: clipped at 0 and divided by the row sum.

    Learning to Impute, Eq. (5) of the appendix; Meta-Gradient, Eq. (6). Neither prints the projection; the code of
    Meta-Gradient makes it.

    Args:
        step: size of the step on the labels.
        project: whether the result is brought back to a probability; a row left all 0 becomes uniform.

    >>> LabelStep(step=1.0).apply(torch.tensor([[0.5, -0.5]]), torch.tensor([[0.5, 0.5]]), None).labels
    tensor([[0., 1.]])
    """

    def __init__(self, *, step: float, project: bool = True) -> None:
        self.step = step
        self.project = project

    def apply(self, gradient: Tensor, labels: Tensor, index: Tensor | None) -> Refined:
        """Labels after the step, weights 1, loss 0."""
        moved = labels - self.step * gradient
        return Refined(project_to_simplex_rows(moved) if self.project else moved, *_unchanged(labels))


class LabelLogitStep(Update):
    """``softmax(q - step dG/dq)`` with ``z = softmax(q)``, so that labels stay probabilities.

    The published code of Learning to Impute, variant "L".

    Args:
        step: size of the step on the logits of the labels.

    >>> LabelLogitStep(step=4.0).apply(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]]), None).labels
    tensor([[0.1192, 0.8808]])
    """

    def __init__(self, *, step: float) -> None:
        self.step = step

    def apply(self, gradient: Tensor, labels: Tensor, index: Tensor | None) -> Refined:
        """Labels after the step, weights 1, loss 0."""
        moved = labels.log() - self.step * losses.softmax_jacobian(labels, gradient)
        return Refined(moved.softmax(-1), *_unchanged(labels))


class PullBack(Update):
    """``loss = weight sum_i <dG/dz_i, z_i>`` with z on the graph: its gradient pulls dG/dz back through the imputer.

    Learning to Impute, Eq. (V2). The labels themselves stay.

    Args:
        weight: of the surrogate.
    """

    needs_graph = True

    def __init__(self, *, weight: float = 1.0) -> None:
        self.weight = weight

    def apply(self, gradient: Tensor, labels: Tensor, index: Tensor | None) -> Refined:
        """The labels as they were, weights 1, and the surrogate."""
        with torch.enable_grad():
            loss = self.weight * (gradient.detach() * labels).sum()
        kept = labels.detach()
        return Refined(kept, kept.new_ones(kept.shape[0]), loss)


class MaskedAdamTable:
    """One row of parameters for each unlabeled example, with Masked Adam: only sampled rows move and age.

    Not All Unlabeled Data Are Equal, Appendix C. The table moves to the device of the first gradient.

    Args:
        values: initial values ``[M]`` or ``[M, C]``.
        lr: learning rate.
        betas: decays of the two moments.
        eps: added to the root of the second moment.
        low: lower bound of a value.
        high: upper bound of a value.
    """

    def __init__(
        self,
        values: Tensor,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        low: float | None = None,
        high: float | None = None,
    ) -> None:
        self.lr = lr
        self.betas = betas
        self.eps = eps
        self.low = low
        self.high = high
        self.values = values
        self.exp_avg = torch.zeros_like(values)
        self.exp_avg_sq = torch.zeros_like(values)
        self.steps = torch.zeros(values.shape[0], dtype=torch.int32, device=values.device)

    def rows(self, index: Tensor) -> Tensor:
        """A copy of the rows ``index``."""
        self.to(index.device)
        return self.values[self._checked(index)]

    def step_(self, index: Tensor, gradient: Tensor) -> None:
        """One step of Masked Adam on the rows ``index``; a repeated index has its gradients summed first."""
        self.to(index.device)
        gradient = gradient.to(self.values.dtype)
        ops.masked_adam_(
            self.values,
            index,
            gradient,
            self.exp_avg,
            self.exp_avg_sq,
            self.steps,
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            low=self.low,
            high=self.high,
        )

    def to(self, device: torch.device | str) -> None:
        """Move the table."""
        if self.values.device == torch.device(device):
            return
        for name in ("values", "exp_avg", "exp_avg_sq", "steps"):
            setattr(self, name, getattr(self, name).to(device))

    def state_dict(self) -> dict[str, Any]:
        """Values, both moments and the step count of every row."""
        return {name: getattr(self, name).clone() for name in ("values", "exp_avg", "exp_avg_sq", "steps")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`state_dict`.

        Raises:
            ValueError: a tensor is missing or of another shape.
        """
        for name in ("values", "exp_avg", "exp_avg_sq", "steps"):
            own = getattr(self, name)
            if name not in state:
                raise ValueError(f"state must have {name!r}, got {sorted(state)}")
            if state[name].shape != own.shape:
                raise ValueError(f"{name} must be {list(own.shape)} like the table, got {list(state[name].shape)}")
        for name in ("values", "exp_avg", "exp_avg_sq", "steps"):
            own = getattr(self, name)
            setattr(self, name, state[name].to(device=own.device, dtype=own.dtype, copy=True))

    def _checked(self, index: Tensor) -> Tensor:
        # On a GPU the check would wait for the device.
        if index.is_cpu and len(index):
            low, high = int(index.min()), int(index.max())
            if low < 0 or high >= len(self.values):
                bad = low if low < 0 else high
                raise IndexError(f"index must be places in the unlabeled set, in [0, {len(self.values)}), got {bad}")
        return index


def _count(value: object, name: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")
    return value


class _TableUpdate(Update):
    needs_index = True
    table: MaskedAdamTable

    def state_dict(self) -> dict[str, Any]:
        """The table."""
        return self.table.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`state_dict`."""
        self.table.load_state_dict(state)


class WeightTable(_TableUpdate):
    """A weight for each unlabeled example, initially 1, stepped by Masked Adam and clipped.

    Args:
        num_examples: M, size of the unlabeled set.
        lr: learning rate of Masked Adam.
        low: smallest weight.
        high: largest weight.
        read: ``before`` the update or ``after`` it: which weights the current step uses.
        dtype: of the table.
    """

    takes = "weights"

    def __init__(
        self,
        num_examples: int,
        *,
        lr: float = 0.01,
        low: float = 0.0,
        high: float = 2.0,
        read: str = "before",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if read not in ("before", "after"):
            raise ValueError(f"read must be 'before' or 'after', got {read!r}")
        values = torch.ones(_count(num_examples, "num_examples", 1), dtype=dtype)
        self.table = MaskedAdamTable(values, lr=checks.number(lr, "lr", low=0.0), low=low, high=high)
        self.read = read

    def weights(self, imputed: Tensor, index: Tensor | None) -> Tensor:
        """The table's rows ``[N]``."""
        assert index is not None, "needs_index"
        return self.table.rows(index).to(imputed.dtype)

    def apply(self, gradient: Tensor, labels: Tensor, index: Tensor | None) -> Refined:
        """The labels as they were, and the weights."""
        assert index is not None, "needs_index"
        weights = self.weights(labels, index)
        self.table.step_(index, gradient)
        if self.read == "after":
            weights = self.weights(labels, index)
        return Refined(labels, weights, labels.new_zeros(()))


class LabelTable(_TableUpdate):
    """Label logits for each unlabeled example, initially 0 (uniform labels), stepped by Masked Adam.

    Label Gradient Alignment, Algorithm 1: ``y = softmax(w)``, and the gradient with respect to w is ``J_y dG/dy``.

    Args:
        num_examples: M, size of the unlabeled set.
        num_classes: C.
        lr: learning rate of Masked Adam.
        dtype: of the table.
    """

    def __init__(
        self, num_examples: int, num_classes: int, *, lr: float = 0.01, dtype: torch.dtype = torch.float32
    ) -> None:
        shape = _count(num_examples, "num_examples", 1), _count(num_classes, "num_classes", 1)
        self.table = MaskedAdamTable(torch.zeros(shape, dtype=dtype), lr=checks.number(lr, "lr", low=0.0))

    def labels(self, imputed: Tensor, index: Tensor | None) -> Tensor:
        """``softmax`` of the table's rows ``[N, C]``; the imputed labels only say the shape."""
        assert index is not None, "needs_index"
        rows = self.table.rows(index)
        if rows.shape != imputed.shape:
            raise ValueError(f"num_classes is {rows.shape[1]}, but logits are {list(imputed.shape)}")
        return rows.to(imputed.dtype).softmax(-1)

    def apply(self, gradient: Tensor, labels: Tensor, index: Tensor | None) -> Refined:
        """The labels of this step; the table holds those of the next."""
        assert index is not None, "needs_index"
        self.table.step_(index, losses.softmax_jacobian(labels, gradient))
        return Refined(labels, *_unchanged(labels))
