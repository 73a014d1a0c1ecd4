"""Learning to Impute (Li, Foo, Bilen; NeurIPS-workshop and journal version)."""

from dataclasses import asdict
from typing import Any, Literal

from fastmeta import checks
from fastmeta.derivatives import Derivative, FeatureSimilarity, LabelGradient
from fastmeta.directions import DirectionRule, HoldoutGradient, LookAhead, UnitLength
from fastmeta.methods.arguments import choice
from fastmeta.methods.base import Method
from fastmeta.presets import l2i as presets
from fastmeta.problem import Reduction
from fastmeta.updates import LabelLogitStep, LabelStep, PullBack, Update


class L2I(Method):
    r"""Labels such that an inner step of training on them lowers the hold-out loss.

    With ``theta* = theta - rate grad C^U(theta, z)``:

    .. math:: \frac{\partial C^H(\theta^*)}{\partial z_i} = \frac{\text{rate}}{B}\, T_i(v), \qquad
        v = \nabla C^H(\theta^*)

    (Eq. (V1)). V1 steps on the labels along it; V2 (Eq. (V2), "O" in the code) leaves them and returns as
    ``Refined.loss`` a surrogate whose gradient is the pull-back of it through the imputer. The defaults are what worked
    best on scikit-learn's digits; :meth:`from_preset` has the published settings.

    Args:
        variant: ``V1`` or ``V2``.
        derivative: ``exact``, or ``eq6``: Eq. (6) of the journal version as printed (feature similarity, no bias, no
            softmax Jacobian).
        inner_loss: of the unlabeled examples; the labels are imputed as its prediction. Any loss of the operators.
        outer_loss: of the hold-out examples.
        reduction: of the inner loss over its examples, ``mean`` or ``sum``; with ``eq6``, ``sum`` also leaves out the
            division by the number of hold-out examples, as printed.
        rate: eta of the inner step.
        look_ahead: take the hold-out gradient at theta* (as published) or at theta.
        labeled_weight: weight of the labeled loss C^T in the inner step.
        unit_length: scale the hold-out gradient to length 1.
        label_space: V1: step on the labels themselves (``probabilities``) or on their ``logits`` (the code).
        label_step: V1: size of that step.
        project: V1 on probabilities: bring the result back to a probability.
        weight: V2: of the surrogate.

    Raises:
        ValueError: an option is not one of those named, or a number is negative.
    """

    def __init__(
        self,
        variant: Literal["V1", "V2"] = "V2",
        *,
        derivative: Literal["exact", "eq6"] = "exact",
        inner_loss: str = "mse_probs",
        outer_loss: str = "cross_entropy",
        reduction: Reduction = "mean",
        rate: float = 1.0,
        look_ahead: bool = False,
        labeled_weight: float = 0.0,
        unit_length: bool = True,
        label_space: Literal["probabilities", "logits"] = "logits",
        label_step: float = 1.0,
        project: bool = True,
        weight: float = 0.5,
    ) -> None:
        choice(variant, "variant", "V1", "V2")
        choice(derivative, "derivative", "exact", "eq6")
        choice(reduction, "reduction", "mean", "sum")
        choice(label_space, "label_space", "probabilities", "logits")
        checks.loss_code(inner_loss)
        checks.loss_code(outer_loss)
        checks.number(rate, "rate", low=0.0)
        softmax = inner_loss in ("mse_probs", "cross_entropy")
        if variant == "V1" and not softmax and (label_space == "logits" or project):
            raise ValueError(f"V1 with {inner_loss} needs label_space='probabilities' and project=False")
        similarity = derivative == "eq6"
        direction: DirectionRule = HoldoutGradient(
            loss=outer_loss,
            bias=not similarity,
            factored=similarity,
            reduction=reduction if similarity else "mean",
        )
        if unit_length:
            direction = UnitLength(direction)
        if look_ahead:
            direction = LookAhead(
                direction, rate=rate, loss=inner_loss, reduction=reduction, labeled_weight=labeled_weight
            )
        gradient: Derivative
        if similarity:
            gradient = FeatureSimilarity(rate=rate, reduction=reduction)
        else:
            gradient = LabelGradient(loss=inner_loss, rate=rate, reduction=reduction)
        update: Update
        if variant == "V2":
            update = PullBack(weight=checks.number(weight, "weight"))
        elif label_space == "logits":
            update = LabelLogitStep(step=checks.number(label_step, "label_step"))
        else:
            update = LabelStep(step=checks.number(label_step, "label_step"), project=project)
        self.inner_loss = inner_loss
        super().__init__(direction, gradient, update)

    @classmethod
    def from_preset(
        cls, name: Literal["paper", "official_code"], variant: Literal["V1", "V2"] = "V2", **overrides: Any
    ) -> "L2I":
        """The settings of the papers or of the published code; ``overrides`` are arguments of the constructor.

        Raises:
            ValueError: unknown preset.
            TypeError: unknown override.

        >>> method = L2I.from_preset("official_code", variant="V1", rate=0.1)
        """
        return cls(**{**asdict(presets.preset(name, variant)), **overrides})
