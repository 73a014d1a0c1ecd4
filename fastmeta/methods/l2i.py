"""Learning to Impute (Li, Foo, Bilen; NeurIPS-workshop and journal version)."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from torch import Tensor

from fastmeta import checks, losses
from fastmeta.derivatives import HOWS, FeatureSimilarity, How, LabelGradient
from fastmeta.directions import DirectionRule, HoldoutGradient, LookAhead, UnitLength
from fastmeta.methods.base import Method
from fastmeta.methods.inner_rate import InnerRate
from fastmeta.ops.process_group import Group
from fastmeta.ops.process_group import check as check_group
from fastmeta.problem import Reduction
from fastmeta.state import PartNumber
from fastmeta.updates import LabelLogitStep, LabelStep, PullBack, Update

Task = Literal["classification", "landmarks"]
SecondReduction = Literal["sum", "mean", "mean_entries"]


@dataclass(frozen=True)
class L2IPreset:
    """Arguments of :class:`fastmeta.L2I`."""

    variant: Literal["V1", "V2"]
    rate: float
    labeled_weight: float
    label_space: Literal["probabilities", "logits"]
    project: bool
    outer_reduction: Reduction
    second_reduction: SecondReduction
    second_weight: float = 1.0
    label_step: float = 1.0
    weight: float = 1.0
    how: How = "jvp"
    inner_loss: str = "mse_probs"
    outer_loss: str = "cross_entropy"
    reduction: Reduction = "sum"
    look_ahead: bool = True
    unit_length: bool = False


@dataclass(frozen=True)
class TrainingPreset:
    """Settings of the loop around the method.

    Args:
        lr: learning rate of the model's optimizer, at the start.
        inner_rate: eta of the inner step for an ``lr`` of 1, in the published units (L2I's ``rate`` are those of
            :meth:`rate_at`).
        unlabeled_weight: lambda of the base's update, after its ramp.
        ramp: fraction of training over which lambda rises from 0, linearly.
        teacher_decay: of the averaged model.
        outputs: over which the published means run too, 1 where they do not; it divides the inner rate.
    """

    lr: float
    inner_rate: float
    unlabeled_weight: float
    ramp: float = 0.4
    teacher_decay: float = 0.999
    outputs: int = 1

    def rate_at(self, lr: float | None = None) -> float:
        """L2I's ``rate`` at a learning rate; None: the first one.

        >>> training("official_code", "V2", "landmarks").rate_at(0.003)  # after the learning rate's drop
        0.003
        """
        return self.inner_rate * (self.lr if lr is None else lr) / self.outputs

    def unlabeled_weight_at(self, progress: float) -> float:
        """Lambda when a fraction ``progress`` of the training steps is done.

        >>> training("official_code").unlabeled_weight_at(0.2)
        25.0
        """
        return self.unlabeled_weight * min(1.0, checks.number(progress, "progress", low=0.0, high=1.0) / self.ramp)


_PAPER = L2IPreset(
    variant="V2",
    rate=0.1,
    labeled_weight=1.0,
    label_space="probabilities",
    project=False,
    outer_reduction="sum",
    second_reduction="sum",
)
# train-L2I-O.py and train-L2I-L.py.
_CODE = L2IPreset(
    variant="V2",
    rate=0.1,
    labeled_weight=0.0,
    label_space="logits",
    project=True,
    outer_reduction="mean",
    second_reduction="mean_entries",
)


def preset(name: str, variant: str, task: str = "classification", outputs: int | None = None) -> L2IPreset:
    """Settings of the ``paper`` or of the ``official_code`` for ``V1`` (there "L") or ``V2`` ("O").

    Algorithm 1 has an inner step on C^T + C^U and sums everywhere (Eq. (1), (2)), and V1 steps on z itself with no
    projection. The published code has C^U alone, a mean hold-out loss, and V1 steps on the logits of the labels.
    Neither paper prints the inner rate or the label step ("tuned"): they are the code's. ``landmarks`` are the settings
    of the regression of AFLW; there the code's means run over examples and coordinates, and the paper's sums, with no
    rate printed, are taken as such means too.

    The labels z of both are what ``refine`` is given. The published code makes them once more for its second update,
    by the student, whoever made those of the base's update, on a second view u2 of the unlabeled images u:
    ``refine(model=model, unlabeled=u, labels=model(u2).softmax(1), ...)``.

    Args:
        name: ``paper`` or ``official_code``.
        variant: ``V1`` or ``V2``.
        task: ``classification`` or ``landmarks``.
        outputs: of the model, for the landmarks: 10 coordinates of 5 points if None.

    >>> preset("paper", "V2").labeled_weight, preset("official_code", "V2").labeled_weight
    (1.0, 0.0)
    >>> preset("official_code", "V2", "landmarks").inner_loss, preset("official_code", "V1", "landmarks").inner_loss
    ('mse_tanh', 'mse')
    """
    chosen = checks.preset({"paper": _PAPER, "official_code": _CODE}, name, "L2I")
    loop = training(name, variant, task, outputs)
    chosen = replace(chosen, variant="V1" if variant == "V1" else "V2", rate=loop.rate_at())
    if task == "classification":
        return chosen
    return replace(
        chosen,
        inner_loss="mse_tanh" if name == "official_code" and variant == "V2" else "mse",
        outer_loss="mse",
        reduction="mean",
        outer_reduction="mean",
        second_reduction="mean_entries",
        label_space="probabilities",
        project=False,
        # The hold-out loss is a mean over the coordinates too.
        label_step=1.0 / loop.outputs,
        weight=1.0 / loop.outputs,
    )


def training(
    name: str, variant: str = "V2", task: str = "classification", outputs: int | None = None
) -> TrainingPreset:
    """The loop around the method; see :func:`preset`.

    The inner rate is 50 times the outer one in V2 and 100 times in V1; for the landmarks 10 times and once.

    >>> [training(name, "V2", "landmarks").unlabeled_weight for name in ("paper", "official_code")]
    [3.0, 75.0]
    """
    published = checks.preset({"paper": True, "official_code": False}, name, "L2I")
    if variant not in ("V1", "V2"):
        raise ValueError(f"variant must be one of V1, V2, got {variant!r}")
    if task == "classification":
        if outputs is not None:
            raise ValueError(f"outputs must be None for classification, got {outputs}")
        return TrainingPreset(lr=0.002, inner_rate=50.0 if variant == "V2" else 100.0, unlabeled_weight=50.0)
    if task != "landmarks":
        raise ValueError(f"task must be one of classification, landmarks, got {task!r}")
    return TrainingPreset(
        lr=0.03,
        inner_rate=10.0 if variant == "V2" else 1.0,
        # 1 in the workshop version, 3 in the journal's; the code's default, which its commands leave as it is.
        unlabeled_weight=3.0 if published else 75.0,
        outputs=_outputs(outputs),
    )


def _outputs(outputs: int | None) -> int:
    if outputs is not None and (isinstance(outputs, bool) or not isinstance(outputs, int) or outputs < 1):
        raise ValueError(f"outputs must be an int >= 1, got {outputs!r}")
    return 10 if outputs is None else outputs


class L2I(Method):
    r"""Labels such that inner steps of training on them lower the hold-out loss.

    With ``theta* = theta - rate grad (C^U(theta, z) + labeled_weight C^T(theta))``:

    .. math:: \frac{\partial C^H(\theta^*)}{\partial z_i} = \frac{\text{rate}}{B}\, T_i(v), \qquad
        v = \nabla C^H(\theta^*)

    (Eq. (V1)). V1 steps on the labels along it; V2 (Eq. (V2), "O" in the code) leaves them and returns as
    ``Refined.loss`` a surrogate whose gradient is the pull-back of it through the imputer: through the model's own
    predictions, or through whatever made ``labels``, which then must be on the graph. The papers weigh the inner losses
    ``C^T + lambda C^U`` at eta; that is ``rate = lambda eta`` and ``labeled_weight = 1 / lambda``.

    The defaults are what worked best on scikit-learn's digits; :meth:`from_preset` has the published settings.

    Args:
        variant: ``V1`` or ``V2``.
        how: ``last_layer``: in closed form, where only the last layer moves; else the whole model moves and its
            derivative is taken in this way (see :func:`fastmeta.label_gradient`): ``jvp`` (exact), ``double_backward``
            (exact, as published), ``finite_difference`` or ``forward_difference``. All but ``last_layer`` need
            ``refine(model=...)``.
        derivative: ``exact``, or ``eq6`` (last layer alone): Eq. (6) of the journal version as printed (feature
            similarity, no bias, no softmax Jacobian).
        inner_loss: of the unlabeled examples, as the loop trains it, one of :data:`fastmeta.losses.LOSSES`: the papers'
            is ``mse_probs``, FixMatch's ``cross_entropy``. Labels are imputed as its prediction. ``mse_tanh``,
            ``|tanh f - tanh z|^2``, is that of the published landmarks.
        outer_loss: of the hold-out examples, and of the labeled ones in the inner loss.
        reduction: of the inner losses over their examples, ``mean`` or ``sum``.
        outer_reduction: of the hold-out loss; ``sum`` as printed in the papers, Eq. (6) included.
        rate: eta of the inner step. May be changed between calls, to follow a schedule.
        look_ahead: take the hold-out gradient at theta* (as published) or at theta.
        steps: K inner steps; more than one need ``look_ahead``.
        momentum: of the inner steps.
        labeled_weight: weight of the labeled loss C^T in the inner step. It is on ``labeled`` where that is given, else
            on the hold-out examples.
        unit_length: scale the hold-out gradient to length 1.
        label_space: V1: step on the labels themselves (``probabilities``) or on their ``logits`` (the code). A hard
            label has no finite logits, and stays: give soft ones.
        label_step: V1: size of that step.
        project: V1 on probabilities: bring the result back to a probability.
        weight: V2: of the surrogate.
        radius: length of the perturbation of a difference.
        second_weight: V1: of :meth:`unlabeled_loss`.
        second_reduction: V1: of :meth:`unlabeled_loss`, over examples (``sum``, ``mean``), or the mean over examples
            and outputs (``mean_entries``).
        process_group: processes that the batch is spread over. V2's surrogate is then multiplied by their number,
            because DistributedDataParallel averages the gradients of what is a sum over all examples.

    Raises:
        ValueError: an option is not one of those named, options contradict each other, or a number is out of range.
    """

    rate = InnerRate()
    weight = PartNumber("update", "weight")
    label_step = PartNumber("update", "step")

    def __init__(
        self,
        variant: Literal["V1", "V2"] = "V2",
        *,
        how: How = "last_layer",
        derivative: Literal["exact", "eq6"] = "exact",
        inner_loss: str = "mse_probs",
        outer_loss: str = "cross_entropy",
        reduction: Reduction = "mean",
        outer_reduction: Reduction = "mean",
        rate: float = 1.0,
        look_ahead: bool = False,
        steps: int = 1,
        momentum: float = 0.0,
        labeled_weight: float = 0.0,
        unit_length: bool = True,
        label_space: Literal["probabilities", "logits"] = "logits",
        label_step: float = 1.0,
        project: bool = True,
        weight: float = 0.5,
        radius: float = 0.01,
        second_weight: float = 1.0,
        second_reduction: SecondReduction = "mean",
        process_group: Group = None,
    ) -> None:
        checks.choice(variant, "variant", "V1", "V2")
        checks.choice(how, "how", *HOWS)
        checks.choice(derivative, "derivative", "exact", "eq6")
        checks.choice(reduction, "reduction", "mean", "sum")
        checks.choice(outer_reduction, "outer_reduction", "mean", "sum")
        checks.choice(label_space, "label_space", "probabilities", "logits")
        checks.choice(second_reduction, "second_reduction", "sum", "mean", "mean_entries")
        checks.loss_code(inner_loss, "inner_loss")
        checks.loss_code(outer_loss, "outer_loss")
        checks.number(rate, "rate", low=0.0)
        checks.number(labeled_weight, "labeled_weight", low=0.0)
        check_group(process_group)
        softmax = losses.of(inner_loss).has_softmax
        if variant == "V1" and not softmax and (label_space == "logits" or project):
            raise ValueError(f"V1 with {inner_loss} needs label_space='probabilities' and project=False")
        similarity = derivative == "eq6"
        if similarity and how != "last_layer":
            raise ValueError(f"derivative='eq6' needs how='last_layer', got {how!r}")
        if not look_ahead and (steps != 1 or momentum != 0 or labeled_weight != 0):
            # The label gradient of one step from theta does not depend on C^T: only theta* does.
            raise ValueError("steps, momentum and labeled_weight need look_ahead=True")
        if similarity and steps != 1:
            raise ValueError(f"derivative='eq6' needs steps=1, got {steps}")
        direction: DirectionRule = HoldoutGradient(
            outer_loss, bias=not similarity, factored=similarity, reduction=outer_reduction
        )
        if unit_length:
            direction = UnitLength(direction)
        if look_ahead:
            direction = LookAhead(
                direction,
                rate=rate,
                loss=inner_loss,
                reduction=reduction,
                labeled_weight=labeled_weight,
                labeled_loss=outer_loss,
                steps=steps,
                momentum=momentum,
            )
        gradient: FeatureSimilarity | LabelGradient
        if similarity:
            gradient = FeatureSimilarity(rate=rate, reduction=reduction)
        else:
            gradient = LabelGradient(loss=inner_loss, rate=rate, reduction=reduction, how=how, radius=radius)
        update: Update
        if variant == "V2":
            update = PullBack(weight=weight, process_group=process_group)
        elif label_space == "logits":
            update = LabelLogitStep(step=checks.number(label_step, "label_step"))
        else:
            update = LabelStep(step=checks.number(label_step, "label_step"), project=project)
        self.inner_loss = inner_loss
        self.second_weight = checks.number(second_weight, "second_weight", low=0.0)
        self.second_reduction = second_reduction
        super().__init__(direction, gradient, update, process_group=process_group)

    def unlabeled_loss(self, logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of V1's second step, in which the model learns the refined labels: C^U of Algorithm 1.

        The papers sum it over examples and outputs; the published code takes a mean over both, with weight 1 in place
        of the base's own weight.

        Args:
            logits: of the unlabeled examples ``[N, C]``, on the graph.
            labels: ``Refined.labels [N, C]``.
            mask: 0 for an example that is left out, else 1, ``[N]``; the mean is over all N.

        >>> import torch
        >>> logits, labels = torch.zeros(3, 2), torch.tensor([[1.0, 0.0]]).expand(3, 2)
        >>> [float(L2I.from_preset(name, "V1").unlabeled_loss(logits, labels)) for name in ("paper", "official_code")]
        [1.5, 0.25]
        """
        per_example = losses.loss_per_example(logits, labels, self.inner_loss)
        if mask is not None:
            per_example = mask * per_example
        if self.second_reduction == "sum":
            return self.second_weight * per_example.sum()
        entries = logits.shape[1] if self.second_reduction == "mean_entries" else 1
        return self.second_weight * per_example.mean() / entries

    @classmethod
    def from_preset(
        cls,
        name: Literal["paper", "official_code"],
        variant: Literal["V1", "V2"] = "V2",
        task: Task = "classification",
        outputs: int | None = None,
        **overrides: Any,
    ) -> "L2I":
        """The settings of the papers or of the published code; ``overrides`` are arguments of the constructor.

        They are of the whole model with the exact derivative; ``how="last_layer"`` gives the form in which only the
        last layer moves. See :func:`fastmeta.methods.l2i.preset`.

        Raises:
            ValueError: unknown preset, variant or task.
            TypeError: unknown override.

        >>> method = L2I.from_preset("official_code", variant="V1", how="last_layer", rate=0.1)
        >>> L2I.from_preset("official_code", task="landmarks").inner_loss
        'mse_tanh'
        """
        return cls(**{**asdict(preset(name, variant, task, outputs)), **overrides})
