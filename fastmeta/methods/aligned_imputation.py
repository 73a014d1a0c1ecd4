"""Aligned imputation: label gradient alignment without a table."""

from typing import Literal

from fastmeta import checks
from fastmeta.derivatives import How, LabelGradient
from fastmeta.directions import DirectionRule, NormalizedGap, UnitLength
from fastmeta.methods.base import Method
from fastmeta.ops.process_group import Group
from fastmeta.ops.process_group import check as check_group
from fastmeta.state import PartNumber
from fastmeta.updates import PullBack


class AlignedImputation(Method):
    r"""Imputed labels under which the unlabeled gradient agrees with the labeled one. Not published.

    .. math:: A(y) = \sum_k \frac{(\mathrm{EMA}(g_l) - g_u(y))_k^2}{\epsilon + \sqrt{\mathrm{EMA}(v_k^4)}}, \qquad
        \texttt{loss} = \text{weight} \sum_i \Bigl\langle \frac{\partial A}{\partial y_i}, y_i(\theta) \Bigr\rangle

    A is the objective of Label Gradient Alignment (Eq. (2)); the pull-back through the imputer is that of Learning to
    Impute (Eq. (V2)). A table of labels learns from one visit in an epoch; here every labeled gradient teaches the
    imputer, whose labels are good from the start, and nothing is kept for each example.

    The labels should come from another view than ``unlabeled`` (or be sharpened): at ``y = p(unlabeled)`` the gradient
    g_u is 0, and the direction is the rescaled average of the labeled gradient alone.

    Args:
        how: ``last_layer``: over its weight and bias, in closed form; else over the whole model, and how its derivative
            is taken, see :func:`fastmeta.label_gradient`. :meth:`refine` then needs the model.
        radius: length of the perturbation of a difference.
        mode: of the model in the method's own passes, ``train`` or ``eval``; None: as it stands.
        inner_loss: of both gradients, as the loop trains them.
        decay: of the average of the labeled gradient.
        decay_norm: of the average of ``v^4``.
        epsilon: added to the scale of each coordinate.
        unit_length: scale the direction to length 1, so that ``weight`` means the same early and late in training; A
            then is what it is up to a factor.
        weight: of the loss.
        process_group: processes that the batch is spread over, whose gradients are summed.

    Raises:
        ValueError: an option is not one of those named, or a number is out of its range.

    >>> import torch, fastmeta
    >>> model = torch.nn.Linear(4, 3)
    >>> with fastmeta.capture_features(model) as tape:
    ...     logits_l, weak, strong = model(torch.ones(5, 4)), model(torch.ones(6, 4)), model(torch.zeros(6, 4))
    >>> refined = AlignedImputation().refine(
    ...     unlabeled=tape.outputs(strong), labels=weak.softmax(-1),
    ...     holdout=tape.outputs(logits_l), targets=torch.zeros(5, dtype=torch.int64))
    >>> refined.loss.backward()
    """

    weight = PartNumber("update", "weight")

    def __init__(
        self,
        *,
        how: How = "last_layer",
        radius: float = 0.01,
        mode: Literal["train", "eval"] | None = None,
        inner_loss: str = "cross_entropy",
        decay: float = 0.99,
        decay_norm: float = 0.99,
        epsilon: float = 1e-3,
        unit_length: bool = True,
        weight: float = 0.5,
        process_group: Group = None,
    ) -> None:
        check_group(process_group)
        checks.loss_code(inner_loss, "inner_loss")
        if mode is not None:
            checks.choice(mode, "mode", "train", "eval")
        direction: DirectionRule = NormalizedGap(
            decay=checks.number(decay, "decay", low=0.0, high=1.0),
            decay_norm=checks.number(decay_norm, "decay_norm", low=0.0, high=1.0),
            epsilon=checks.number(epsilon, "epsilon", low=0.0),
            loss=inner_loss,
        )
        if unit_length:
            direction = UnitLength(direction)
        self.mode = mode
        self.inner_loss = inner_loss
        gradient = LabelGradient(inner_loss, how=how, radius=radius)
        update = PullBack(weight=weight, process_group=process_group)
        super().__init__(direction, gradient, update, process_group=process_group)
