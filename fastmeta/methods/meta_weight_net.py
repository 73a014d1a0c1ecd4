"""Meta-Weight-Net: Learning an Explicit Mapping For Sample Weighting (Shu, Xie, Yi, Zhao, Zhou, Xu, Meng; 2019)."""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from fastmeta import checks, losses
from fastmeta.derivatives import ExampleWeightGradient, How
from fastmeta.directions import DirectionRule, HoldoutGradient, LookAhead
from fastmeta.methods.base import Method
from fastmeta.methods.inner_rate import InnerRate
from fastmeta.ops.masked_adam_table import MaskedAdamTable
from fastmeta.ops.process_group import Group, sum_over
from fastmeta.ops.process_group import check as check_group
from fastmeta.problem import LastLayerProblem, Problem, probabilities
from fastmeta.state import Number
from fastmeta.updates import Refined, Update


class WeightNet(Update):
    r"""Weights ``V(l_i; Theta)`` by a net with one hidden layer, whose parameters descend ``dG/dw_i dV(l_i)/dTheta``.

    .. math:: V(l) = \sigma\bigl(b_2 + \langle a_2, \max(0, a_1 l + b_1) \rangle\bigr), \qquad
        \Theta \leftarrow \mathrm{Adam}\Bigl(\sum_i \frac{\partial G}{\partial w_i} \nabla_\Theta V(l_i; \Theta)
        + \text{decay}\, \Theta\Bigr)

    Meta-Weight-Net, Algorithm 1, and its published code, which has Adam; the step uses the weights after the update.

    Args:
        loss: whose values the net is given.
        hidden: units of its hidden layer.
        lr: learning rate of Adam.
        weight_decay: of Adam, added to the gradient.
        seed: of the parameters at the start, drawn as those of ``torch.nn.Linear``; the same on all processes.
        process_group: processes that the batch is spread over.
        dtype: of the parameters.
    """

    takes = "weights"
    weight_decay = Number()

    def __init__(
        self,
        loss: str = "cross_entropy",
        *,
        hidden: int = 100,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        seed: int = 0,
        process_group: Group = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if isinstance(hidden, bool) or not isinstance(hidden, int) or hidden < 1:
            raise ValueError(f"hidden must be an int >= 1, got {hidden!r}")
        checks.loss_code(loss)
        self.loss = loss
        self.weight_decay = weight_decay
        self.process_group = process_group
        self.sizes = hidden, hidden, hidden, 1
        bounds = torch.tensor([1.0, 1.0, hidden**-0.5, hidden**-0.5], dtype=torch.float64)
        uniform = torch.rand(sum(self.sizes), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        start = (2 * uniform - 1) * bounds.repeat_interleave(torch.tensor(self.sizes))
        self.table = MaskedAdamTable(start.to(dtype).unsqueeze(0), lr=lr)  # one row, so that Adam moves all of it
        self._losses: Tensor | None = None  # those of the step that is being taken

    @property
    def lr(self) -> float:
        """Learning rate of Adam."""
        return self.table.lr

    @lr.setter
    def lr(self, value: float) -> None:
        self.table.lr = value

    def net(self, values: Tensor, parameters: Tensor | None = None) -> Tensor:
        """``V(l_i)`` of losses ``[N]``; ``[N]``.

        Args:
            values: the losses.
            parameters: ``a_1, b_1, a_2, b_2`` one after another ``[3 hidden + 1]``; None: as they are.
        """
        self.table.move(values.device)
        theta = self.table.values[0].to(values.dtype) if parameters is None else parameters
        a_1, b_1, a_2, b_2 = theta.split(self.sizes)
        finite = values.where(values.isfinite(), 0)  # a step that is not finite has finite weights
        hidden = (finite.unsqueeze(-1) * a_1 + b_1).relu()
        return (hidden @ a_2 + b_2).sigmoid()

    def enter(self, problem: Problem) -> Problem:
        """The problem with the net's weights of its examples."""
        logits = problem.logits
        self._losses = losses.loss_per_example(logits, probabilities(problem.labels, logits, self.loss), self.loss)
        weights = self.net(self._losses)
        if isinstance(problem, LastLayerProblem):
            return replace(problem, weights=weights)
        return replace(problem, weights=weights)

    def forward(self, gradient: Tensor, labels: Tensor, index: Tensor | None) -> Refined:
        """The labels as they were, and the weights after a step of the net."""
        assert self._losses is not None, "of this step"
        theta = self.table.values[0].detach().to(gradient.dtype, copy=True).requires_grad_()
        with torch.enable_grad():
            weights = self.net(self._losses, theta)
        (pulled,) = torch.autograd.grad(weights, theta, gradient)
        (total,) = sum_over([pulled], self.process_group)
        total = total + self.weight_decay * theta.detach()
        self.table.step_(torch.zeros(1, dtype=torch.int64, device=total.device), total.unsqueeze(0))
        weights, self._losses = self.net(self._losses), None
        return Refined(labels, weights, labels.new_zeros(()))


class MetaWeightNet(Method):
    r"""Example weights as a function of the examples' losses, learned through one inner step of training.

    With ``w_i = V(l_i; Theta)`` and ``theta* = theta - (rate / B) sum_i w_i grad l_i``:

    .. math:: \nabla_\Theta C^H(\theta^*) = \sum_i -\frac{\text{rate}}{B} \langle \nabla \ell_i(\theta),
        \nabla C^H(\theta^*) \rangle\, \nabla_\Theta V(l_i; \Theta)

    (Algorithm 1): the published second derivative through a copy of the model is a look-ahead, a
    derivative of the examples' losses and a backward pass of a net of 301 numbers. It has no table: what it learns of
    losses serves examples it has never seen.

    Args:
        how: ``last_layer``: in closed form, where only the last layer moves; else over the whole model, as published,
            and how the derivative is taken, see :func:`fastmeta.example_weight_gradient`. :meth:`refine` then needs
            the model.
        radius: length of the perturbation of a difference.
        mode: of the model in the method's own passes, ``train`` (as published) or ``eval``; None: as it stands.
        inner_loss: of the unlabeled examples, as the loop trains it, and what the net is given.
        outer_loss: of the hold-out examples.
        rate: of the inner step; as published the learning rate of the model. May be changed between calls.
        look_ahead: take the hold-out gradient at theta* (as published) or at theta.
        hidden: units of the net.
        lr: learning rate of its Adam.
        weight_decay: of its Adam.
        seed: of its parameters at the start.
        process_group: processes that the batch is spread over.
        dtype: of the net.

    Raises:
        ValueError: an option is not one of those named, or a number is out of its range.

    >>> import torch, fastmeta
    >>> model = torch.nn.Linear(4, 3)
    >>> with fastmeta.capture_features(model) as tape:
    ...     logits_l, weak, strong = model(torch.ones(5, 4)), model(torch.ones(6, 4)), model(torch.zeros(6, 4))
    >>> refined = MetaWeightNet(rate=0.1).refine(
    ...     unlabeled=tape.outputs(strong), labels=weak.softmax(-1),
    ...     holdout=tape.outputs(logits_l), targets=torch.zeros(5, dtype=torch.int64))
    >>> refined.weights.shape, bool((refined.weights > 0).all())
    (torch.Size([6]), True)
    """

    update: WeightNet
    rate = InnerRate()

    def __init__(
        self,
        *,
        how: How = "last_layer",
        radius: float = 0.01,
        mode: Literal["train", "eval"] | None = None,
        inner_loss: str = "cross_entropy",
        outer_loss: str = "cross_entropy",
        rate: float = 0.1,
        look_ahead: bool = True,
        hidden: int = 100,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        seed: int = 0,
        process_group: Group = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_group(process_group)
        checks.loss_code(inner_loss, "inner_loss")
        checks.loss_code(outer_loss, "outer_loss")
        checks.number(rate, "rate", low=0.0)
        if mode is not None:
            checks.choice(mode, "mode", "train", "eval")
        self.mode = mode
        self.inner_loss = inner_loss
        direction: DirectionRule = HoldoutGradient(outer_loss)
        if look_ahead:
            direction = LookAhead(direction, rate=rate, loss=inner_loss)
        gradient = ExampleWeightGradient(inner_loss, rate=rate, reduction="mean", how=how, radius=radius)
        update = WeightNet(
            inner_loss,
            hidden=hidden,
            lr=lr,
            weight_decay=weight_decay,
            seed=seed,
            process_group=process_group,
            dtype=dtype,
        )
        super().__init__(direction, gradient, update, process_group=process_group)

    def weight_of(self, values: Tensor) -> Tensor:
        """The weights ``[N]`` that the net gives to losses ``[N]``: what it has learned."""
        with torch.no_grad():
            return self.update.net(values)
