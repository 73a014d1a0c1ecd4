"""Learning to Reweight Examples for Robust Deep Learning (Ren, Zeng, Yang, Urtasun; 2018)."""

from typing import Literal

from torch import Tensor

from fastmeta import checks
from fastmeta.derivatives import ExampleWeightGradient, How
from fastmeta.directions import HoldoutGradient
from fastmeta.methods.base import Method
from fastmeta.ops.process_group import Group, joined_count, sum_over
from fastmeta.ops.process_group import check as check_group
from fastmeta.updates import Refined, Update


class PositivePart(Update):
    """``max(-dG/dw_i, 0)``, divided by its sum over the batch; all 0 where nothing helps.

    Learning to Reweight, Algorithm 1; its published code has the same.

    Args:
        total: what the weights sum to: ``one``, as published, for a loss that is their sum; ``count``, the number of
            examples, for a loss that is a mean over them. Both are the same step.
        process_group: processes that the batch is spread over.

    >>> import torch
    >>> PositivePart(total="one")(torch.tensor([-1.0, 2.0, -3.0]), torch.zeros(3, 2), None).weights
    tensor([0.2500, 0.0000, 0.7500])
    """

    takes = "weights"

    def __init__(self, *, total: Literal["one", "count"] = "count", process_group: Group = None) -> None:
        super().__init__()
        checks.choice(total, "total", "one", "count")
        self.total = total
        self.process_group = process_group

    def forward(self, gradient: Tensor, labels: Tensor, index: Tensor | None) -> Refined:
        """The labels as they were, the weights, loss 0."""
        positive = (-gradient).clamp_min(0)
        ((total,),) = sum_over([positive.sum().view(1)], self.process_group)
        wanted = 1 if self.total == "one" else joined_count(len(labels), self.process_group, labels.device)
        return Refined(labels, positive * (wanted / total.where(total > 0, 1)), labels.new_zeros(()))


class LearningToReweight(Method):
    r"""Weights of this step alone, from one inner step of training that starts with all weights at 0.

    .. math:: u_i = \left. \frac{\partial C^H(\theta - \sum_j w_j \nabla \ell_j)}{\partial w_i} \right|_{w = 0}
        = -\langle \nabla \ell_i, \nabla C^H(\theta) \rangle, \qquad w_i \propto \max(-u_i, 0)

    (Algorithm 1). At weights of 0 the inner step leaves theta where it is: there is no look-ahead, its rate cancels in
    the sum to 1, and the published second derivative is the derivative of the examples' losses along the hold-out
    gradient. :class:`fastmeta.ExampleWeights` with ``inverse_hessian="identity"`` has the same direction and
    derivative, and keeps its weights from step to step.

    Args:
        how: ``last_layer``: in closed form, where only the last layer moves; else over the whole model, as published,
            and how the derivative is taken, see :func:`fastmeta.example_weight_gradient`. :meth:`refine` then needs
            the model.
        radius: length of the perturbation of a difference.
        mode: of the model in the method's own passes, ``train`` (as published) or ``eval``; None: as it stands.
        inner_loss: of the unlabeled examples, as the loop trains it.
        outer_loss: of the hold-out examples.
        total: what the weights of a batch sum to, see :class:`PositivePart`.
        process_group: processes that the batch is spread over.

    Raises:
        ValueError: an option is not one of those named, or a number is out of its range.

    >>> import torch, fastmeta
    >>> model = torch.nn.Linear(4, 3)
    >>> with fastmeta.capture_features(model) as tape:
    ...     logits_l, weak, strong = model(torch.ones(5, 4)), model(torch.ones(6, 4)), model(torch.ones(6, 4))
    >>> hard = torch.eye(3)[[0, 0, 0, 1, 1, 1]]
    >>> refined = LearningToReweight().refine(
    ...     unlabeled=tape.outputs(strong), labels=hard,
    ...     holdout=tape.outputs(logits_l), targets=torch.zeros(5, dtype=torch.int64))
    >>> refined.weights.round()
    tensor([2., 2., 2., 0., 0., 0.])
    """

    def __init__(
        self,
        *,
        how: How = "last_layer",
        radius: float = 0.01,
        mode: Literal["train", "eval"] | None = None,
        inner_loss: str = "cross_entropy",
        outer_loss: str = "cross_entropy",
        total: Literal["one", "count"] = "count",
        process_group: Group = None,
    ) -> None:
        check_group(process_group)
        checks.loss_code(inner_loss, "inner_loss")
        checks.loss_code(outer_loss, "outer_loss")
        if mode is not None:
            checks.choice(mode, "mode", "train", "eval")
        self.mode = mode
        self.inner_loss = inner_loss
        derivative = ExampleWeightGradient(inner_loss, how=how, radius=radius)
        update = PositivePart(total=total, process_group=process_group)
        super().__init__(HoldoutGradient(outer_loss), derivative, update, process_group=process_group)
