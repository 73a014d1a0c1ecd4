"""Labels pulled back and weights learned, of one inner step."""

from typing import Literal

import torch
from torch import Tensor

from fastmeta import checks
from fastmeta.derivatives import How, LabelAndWeightGradient
from fastmeta.directions import DirectionRule, HoldoutGradient, LookAhead, UnitLength
from fastmeta.methods.base import Method
from fastmeta.methods.inner_rate import InnerRate
from fastmeta.ops.process_group import Group
from fastmeta.ops.process_group import check as check_group
from fastmeta.state import PartNumber
from fastmeta.updates import PullBackAndWeights


class ImputeAndWeight(Method):
    r"""Labels and example weights that both lower the hold-out loss of one inner step. Not published.

    With ``theta* = theta - (rate / B) sum_i w_i grad l(f_i, z_i)`` and ``v = grad C^H(theta*)``:

    .. math:: \frac{\partial C^H(\theta^*)}{\partial z_i} = \frac{\text{rate}}{B} w_i\, T_i(v), \qquad
        \frac{\partial C^H(\theta^*)}{\partial w_i} = -\frac{\text{rate}}{B} D_v l_i

    One direction and one pass give both: the first is pulled back through the imputer (Learning to Impute, Eq. (V2)),
    the second steps a table of weights (Not All Unlabeled Data Are Equal, Algorithm 1, with an inner step in place of
    the inverse Hessian). A wrong label that the imputer cannot mend loses its weight; one that it can is mended.

    The labels must come from another view than ``unlabeled`` (or be sharpened): at ``z = p(unlabeled)`` every gradient
    of ``l_i`` is 0, the weights stay as they are, and a warning says so.

    Args:
        num_examples: M, size of the unlabeled set.
        how: ``last_layer``: in closed form, where only the last layer moves; else how the whole model's derivative is
            taken, see :func:`fastmeta.label_gradient`. :meth:`refine` then needs the model.
        radius: length of the perturbation of a difference.
        mode: of the model in the method's own passes, ``train`` or ``eval``; None: as it stands.
        inner_loss: l, of the unlabeled examples, as the loop trains it.
        outer_loss: of the hold-out examples.
        rate: eta of the inner step.
        look_ahead: take the hold-out gradient at theta* or at theta.
        unit_length: scale the hold-out gradient to length 1.
        weight: of ``Refined.loss``, the surrogate of the labels.
        lr: learning rate of Masked Adam on the weights.
        low: smallest weight.
        high: largest weight.
        read: whether the step uses its weights from ``before`` or ``after`` their update.
        process_group: processes that the batch is spread over: a step is that on the joined batch, and every process
            has the complete table.
        sharded: a process keeps the rows i of the table with ``i % processes`` its rank alone; reading them, also by
            ``state_dict``, is then a call that every process makes.
        dtype: of the table.

    Raises:
        ValueError: an option is not one of those named, or a number is out of its range.

    >>> import torch, fastmeta
    >>> model = torch.nn.Linear(4, 3)
    >>> with fastmeta.capture_features(model) as tape:
    ...     logits_l, weak, strong = model(torch.ones(5, 4)), model(torch.ones(6, 4)), model(torch.zeros(6, 4))
    >>> refined = ImputeAndWeight(num_examples=6).refine(
    ...     unlabeled=tape.outputs(strong), labels=weak.softmax(-1), index=torch.arange(6),
    ...     holdout=tape.outputs(logits_l), targets=torch.zeros(5, dtype=torch.int64))
    >>> refined.labels.shape, refined.weights.shape, refined.loss.requires_grad
    (torch.Size([6, 3]), torch.Size([6]), True)
    """

    update: PullBackAndWeights
    rate = InnerRate()
    lr = PartNumber("update", "lr")
    weight = PartNumber("update", "weight")

    def __init__(
        self,
        num_examples: int,
        *,
        how: How = "last_layer",
        radius: float = 0.01,
        mode: Literal["train", "eval"] | None = None,
        inner_loss: str = "cross_entropy",
        outer_loss: str = "cross_entropy",
        rate: float = 1.0,
        look_ahead: bool = False,
        unit_length: bool = True,
        weight: float = 0.5,
        lr: float = 0.01,
        low: float = 0.0,
        high: float = 2.0,
        read: Literal["before", "after"] = "after",
        process_group: Group = None,
        sharded: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_group(process_group)
        if mode is not None:
            checks.choice(mode, "mode", "train", "eval")
        checks.loss_code(inner_loss, "inner_loss")
        checks.loss_code(outer_loss, "outer_loss")
        checks.number(rate, "rate", low=0.0)
        direction: DirectionRule = HoldoutGradient(loss=outer_loss)
        if unit_length:
            direction = UnitLength(direction)
        if look_ahead:
            direction = LookAhead(direction, rate=rate, loss=inner_loss)
        self.mode = mode
        self.inner_loss = inner_loss
        gradient = LabelAndWeightGradient(inner_loss, rate=rate, how=how, radius=radius)
        update = PullBackAndWeights(
            num_examples,
            weight=weight,
            process_group=process_group,
            sharded=sharded,
            lr=lr,
            low=low,
            high=high,
            read=read,
            dtype=dtype,
        )
        super().__init__(direction, gradient, update, process_group=process_group)

    @property
    def weights(self) -> Tensor:
        """The weights of all unlabeled examples ``[M]``."""
        return self.update.table.complete()
