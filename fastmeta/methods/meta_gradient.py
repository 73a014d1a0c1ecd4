"""Semi-Supervised Learning with Meta-Gradient (Zhang, Xiao, Jia, Cheng, Yang)."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from torch import Tensor, nn

from fastmeta import checks, losses, ops
from fastmeta.derivatives import FiniteDifference, LabelGradient
from fastmeta.directions import HoldoutGradient
from fastmeta.methods.base import Method
from fastmeta.methods.batch import Batch
from fastmeta.methods.step_condition import StepCondition, step_condition
from fastmeta.ops.process_group import Group
from fastmeta.ops.process_group import check as check_group
from fastmeta.problem import Problem, check_how, single
from fastmeta.problem.model_function import Inputs, ModelFunction
from fastmeta.updates import LabelStep, Refined

How = Literal[
    "last_layer", "last_layer_difference", "jvp", "double_backward", "finite_difference", "forward_difference"
]


@dataclass(frozen=True)
class MetaGradientPreset:
    """Arguments of :class:`fastmeta.MetaGradient`."""

    step: float
    rate: float | None
    project: bool
    synchronize: bool
    how: How = "finite_difference"
    radius: float = 0.01
    statistics: Literal["batch", "running"] = "running"


@dataclass(frozen=True)
class TrainingPreset:
    """Settings of the loop around the method.

    Args:
        scheduled: which of the method's ``rate`` (alpha_t) and ``step`` (beta_t) is the learning rate of each step.
        ramp: fraction of training over which the weight of the consistency loss rises from 0 to 1, linearly.
        lr: learning rate of the model's SGD after its warm-up.
        mix_up: both parameters of the Beta distribution of mix-up (1.0 for CIFAR and ImageNet, 0.1 for SVHN).
    """

    scheduled: Literal["rate", "step"]
    ramp: float
    lr: float = 0.1
    mix_up: float = 1.0

    def consistency_weight_at(self, progress: float) -> float:
        """The weight of the consistency loss when a fraction ``progress`` of the training steps is done.

        >>> [training(name).consistency_weight_at(0.005) for name in ("paper", "official_code")]
        [1.0, 0.5]
        """
        checks.number(progress, "progress", low=0.0, high=1.0)
        return 1.0 if self.ramp == 0 else min(1.0, progress / self.ramp)


# Eq. (16) has alpha / B before the difference; alpha is the learning rate, 0.1. The slides print no beta: with 128 the
# step is that of the code, 0.1, at its batch size of 128. Nothing is projected; the labeled gradient is the batch's.
_PAPER = MetaGradientPreset(step=128.0, rate=0.1, project=False, synchronize=True)
# train_meta.py: beta is the learning rate, no alpha / B, then relu and division by the row sum. On several GPUs each
# process steps along the gradient of its own labeled examples.
_CODE = MetaGradientPreset(step=0.1, rate=None, project=True, synchronize=False)


def preset(name: str) -> MetaGradientPreset:
    """Settings of the ``paper`` (slides) or of the ``official_code``.

    >>> preset("official_code").project
    True
    """
    return checks.preset({"paper": _PAPER, "official_code": _CODE}, name, "MetaGradient")


def training(name: str) -> TrainingPreset:
    """The loop of the ``paper`` (slides, no ramp) or of the ``official_code`` (a ramp of 4,000 of 400,000 steps).

    >>> training("official_code").scheduled
    'step'
    """
    presets = {
        "paper": TrainingPreset(scheduled="rate", ramp=0.0),
        "official_code": TrainingPreset(scheduled="step", ramp=0.01),
    }
    return checks.preset(presets, name, "MetaGradient")


class MetaGradient(Method):
    r"""One step on the labels down the labeled loss after an inner step of training on them.

    .. math:: \hat y_i = \tilde y_i - \beta\, \frac{\alpha}{B}\, 2 D_v p_i, \qquad v = \nabla L_{labeled}(\theta)

    (Eq. (6) with (13), inner loss ``|p - y|^2``). With a difference, as published, the term ``2 D_v p`` is
    ``(p(theta + epsilon v) - p(theta - epsilon v)) / epsilon``, ``epsilon = radius / ||v||`` (Eq. (16)): a finite
    probe, not the derivative.

    Algorithm 1 is a step on the consistency loss against the labels that come back; Algorithm 2 mixes them and the
    labeled examples first: see ``fastmeta/examples/meta_gradient.py``.

    Args:
        how: of the last layer alone: ``last_layer`` (exact) or ``last_layer_difference`` (its probes); of the whole
            model, with ``refine(model=...)``: ``jvp`` (exact), ``double_backward`` (exact, slow),
            ``finite_difference`` (the published probes, parameters perturbed in place) or ``forward_difference`` (one
            probe; its other point gives the imputed labels).
        step: beta, the step on the labels. May be changed between calls, to follow a schedule.
        rate: alpha of the inner step, which then is on a mean over the batch; may be changed, too. None leaves out
            ``alpha / B``, as Algorithm 2 and the code do: the step is then ``step * 2 D_v p`` for any batch.
        radius: length of the perturbation of a difference.
        inner_loss: of the unlabeled examples, as the loop trains it. The published ``mse_probs`` is ``|p - y|^2``; a
            FixMatch loop trains ``cross_entropy``, whose label gradient has ``D_v log p`` in place of ``2 D_v p``.
        outer_loss: of the labeled examples.
        project: clip at 0 and divide by the row sum, which with the published loss never is 0: the steps of a row's
            labels add up to 0. With another a row left all 0 becomes uniform.
        statistics: of the passes that the method makes itself: ``running``: the model in evaluation mode (running
            statistics, no dropout), as published; ``batch``: the model as it stands.
        synchronize: whether the labeled gradient is that of all processes of ``process_group`` or, as in the published
            code, of each process alone.
        process_group: processes that the batch is spread over.

    Raises:
        ValueError: an option is not one of those named, or a number is negative.
    """

    update: LabelStep

    def __init__(
        self,
        *,
        how: How = "last_layer",
        step: float = 0.1,
        rate: float | None = None,
        radius: float = 0.01,
        inner_loss: str = "mse_probs",
        outer_loss: str = "cross_entropy",
        project: bool = True,
        statistics: Literal["batch", "running"] = "batch",
        synchronize: bool = True,
        process_group: Group = None,
    ) -> None:
        checks.choice(how, "how", *get_args(How))
        checks.choice(statistics, "statistics", "batch", "running")
        check_how("finite_difference", radius)
        check_group(process_group)
        alpha = 1.0 if rate is None else checks.number(rate, "rate", low=0.0)
        reduction: Literal["mean", "sum"] = "sum" if rate is None else "mean"
        checks.loss_code(inner_loss, "inner_loss")
        checks.loss_code(outer_loss, "outer_loss")
        if how == "last_layer_difference" and inner_loss != "mse_probs":
            raise ValueError(f"inner_loss must be mse_probs for how='last_layer_difference', got {inner_loss!r}")
        if project and not losses.of(inner_loss).has_softmax:
            raise ValueError(f"project must be False for {inner_loss}, whose labels are no probabilities")
        gradient: LabelGradient | FiniteDifference
        if how == "last_layer_difference":
            gradient = FiniteDifference(radius=radius, rate=alpha, reduction=reduction)
        elif how in ("finite_difference", "forward_difference") and inner_loss == "mse_probs":
            gradient = FiniteDifference(radius=radius, rate=alpha, reduction=reduction, how=how)
        else:
            gradient = LabelGradient(inner_loss, rate=alpha, reduction=reduction, how=how, radius=radius)
        self.inner_loss = inner_loss
        self._gradient = gradient
        update = LabelStep(step=step, project=project)
        self.mode = "eval" if statistics == "running" else None
        super().__init__(
            HoldoutGradient(outer_loss), gradient, update, process_group=process_group if synchronize else None
        )
        self._calls.processes_checked = not synchronize  # as published: each process by itself

    @property
    def step(self) -> float:
        """Beta, the step on the labels."""
        return self.update.step

    @step.setter
    def step(self, value: float) -> None:
        self.update.step = value

    @property
    def rate(self) -> float | None:
        """Alpha of the inner step; None where ``alpha / B`` is left out, and stays so."""
        return self._gradient.rate if self._gradient.reduction == "mean" else None

    @rate.setter
    def rate(self, value: float) -> None:
        if self._gradient.reduction != "mean":
            raise ValueError(f"rate must stay None, which leaves out alpha / B, got {value}; change step")
        self._gradient = self.derivative = replace(self._gradient, rate=checks.number(value, "rate", low=0.0))

    @classmethod
    def from_preset(cls, name: Literal["paper", "official_code"], **overrides: Any) -> "MetaGradient":
        """The settings of the slides or of the published code; ``overrides`` are arguments of the constructor.

        They are of the whole model; ``how="last_layer"`` (or ``"last_layer_difference"``) is the cheap form.

        Raises:
            ValueError: unknown preset.
            TypeError: unknown override.

        >>> MetaGradient.from_preset("official_code", step=0.03).step
        0.03
        """
        return cls(**{**asdict(preset(name)), **overrides})

    def step_condition(
        self,
        *,
        model: nn.Module,
        unlabeled: Inputs,
        holdout: Inputs,
        targets: Tensor,
        lr: float | None = None,
        iterations: int = 20,
    ) -> StepCondition:
        """Whether ``step`` meets the condition of the convergence theorem here, ``alpha^2 beta < 1 / (4 M^2 L_0)``.

        A local estimate, not a bound; see :func:`fastmeta.methods.step_condition.step_condition`.

        Args:
            model: at the parameters that are meant.
            unlabeled: inputs of the B unlabeled examples.
            holdout: inputs of the labeled examples.
            targets: their labels, int64 classes ``[Nh]`` or probabilities ``[Nh, C]``.
            lr: learning rate of the model's own SGD step, the other alpha; None: ``rate``.
            iterations: of both power iterations.

        Raises:
            ValueError: neither ``lr`` nor ``rate`` is given, a number is out of range, or ``inner_loss`` is not that of
                the theorem.
        """
        if self.inner_loss != "mse_probs":
            raise ValueError(f"inner_loss must be mse_probs, which the theorem is about, got {self.inner_loss!r}")
        rate = self.rate
        if lr is None:
            if rate is None:
                raise ValueError("lr is needed where rate is None: the learning rate of the model's own SGD step")
            lr = rate
        batch = Batch(unlabeled, holdout, targets, model=model)
        self._check(batch)
        problem = self._model_problem(ModelFunction(model, mode=self.mode), batch)
        # Without alpha / B the step on the labels is that of alpha = B.
        alpha = float(len(problem.logits)) if rate is None else rate
        return step_condition(problem, alphas=(alpha, lr), step=self.step, iterations=iterations)

    def _step(self, problem: Problem | None, index: Tensor | None, labels: Tensor | None) -> Refined | Tensor:
        probe = self.derivative
        if problem is None or not isinstance(probe, FiniteDifference) or problem.inner_weights is not None:
            return super()._step(problem, index, labels)
        direction = single(self.direction(problem))
        # The same step in one kernel.
        plus, minus, epsilon = probe.probes(problem, direction)
        labels = problem.labels if labels is None else labels
        step, epsilon = probe.step_over(epsilon, problem, self.step)
        moved = ops.finite_difference_labels(plus, minus, labels, epsilon, step=step, project=self.update.project)
        return Refined(moved, moved.new_ones(len(moved)), moved.new_zeros(()))
