"""Semi-Supervised Learning with Meta-Gradient (Zhang, Xiao, Jia, Cheng, Yang)."""

from dataclasses import asdict, replace
from typing import Any, Literal, get_args

from torch import Tensor, nn

from fastmeta import checks, ops
from fastmeta.derivatives import FiniteDifference, LabelGradient
from fastmeta.derivatives.derivative import check_how
from fastmeta.directions import HoldoutGradient
from fastmeta.methods.arguments import choice
from fastmeta.methods.base import Batch, Method
from fastmeta.methods.step_condition import StepCondition, step_condition
from fastmeta.model_function import Inputs, ModelFunction, batch_size
from fastmeta.model_problem import AnyProblem, Trajectory
from fastmeta.presets import meta_gradient as presets
from fastmeta.presets.meta_gradient import How
from fastmeta.problem import Refined
from fastmeta.process_group import Group
from fastmeta.process_group import check as check_group
from fastmeta.updates import LabelStep


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
        project: clip at 0 and divide by the row sum, which never is 0: the steps of a row's labels add up to 0.
        statistics: of the passes that the method makes itself: ``running``: the model in evaluation mode (running
            statistics, no dropout), as published; ``batch``: the model as it stands.
        synchronize: whether the labeled gradient is that of all processes of ``process_group`` or, as in the published
            code, of each process alone.
        process_group: processes that the batch is spread over.

    Raises:
        ValueError: an option is not one of those named, or a number is negative.
    """

    def __init__(
        self,
        *,
        how: How = "last_layer",
        step: float = 0.1,
        rate: float | None = None,
        radius: float = 0.01,
        project: bool = True,
        statistics: Literal["batch", "running"] = "batch",
        synchronize: bool = True,
        process_group: Group = None,
    ) -> None:
        choice(how, "how", *get_args(How))
        choice(statistics, "statistics", "batch", "running")
        check_how("finite_difference", radius)
        check_group(process_group)
        alpha = 1.0 if rate is None else checks.number(rate, "rate", low=0.0)
        reduction: Literal["mean", "sum"] = "sum" if rate is None else "mean"
        gradient: LabelGradient | FiniteDifference
        if how == "last_layer_difference":
            gradient = FiniteDifference(radius=radius, rate=alpha, reduction=reduction)
        elif how == "finite_difference" or how == "forward_difference":
            gradient = FiniteDifference(radius=radius, rate=alpha, reduction=reduction, how=how)
        else:
            gradient = LabelGradient(rate=alpha, reduction=reduction, how=how)
        self._gradient = gradient
        self._labels = LabelStep(step=checks.number(step, "step"), project=project)
        self.mode = "eval" if statistics == "running" else None
        super().__init__(
            HoldoutGradient(), gradient, self._labels, process_group=process_group if synchronize else None
        )

    @property
    def step(self) -> float:
        """Beta, the step on the labels."""
        return self._labels.step

    @step.setter
    def step(self, value: float) -> None:
        self._labels.step = checks.number(value, "step")

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
        return cls(**{**asdict(presets.preset(name)), **overrides})

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
            ValueError: neither ``lr`` nor ``rate`` is given, or a number is out of range.
        """
        rate = self.rate
        if lr is None:
            if rate is None:
                raise ValueError("lr is needed where rate is None: the learning rate of the model's own SGD step")
            lr = rate
        # Without alpha / B the step on the labels is that of alpha = B.
        alpha = float(batch_size(unlabeled, "unlabeled")) if rate is None else rate
        batch: Batch = dict.fromkeys(("labels", "index", "mask", "labeled", "labeled_targets", "holdout_gradient"))
        batch |= {"unlabeled": unlabeled, "holdout": holdout, "targets": targets}
        problem, _ = self._model_problem(ModelFunction(model, mode=self.mode), batch)
        return step_condition(problem, alphas=(alpha, lr), step=self.step, iterations=iterations)

    def _step(self, problem: AnyProblem, index: Tensor | None) -> Refined | Tensor:
        probe = self.derivative
        if not isinstance(probe, FiniteDifference) or problem.inner_weights is not None:
            return super()._step(problem, index)
        direction = self.direction(problem)
        assert not isinstance(direction, Trajectory), "of one inner step"
        # The same step in one kernel.
        plus, minus, epsilon = probe.probes(problem, direction)
        labels = problem.labels
        step, epsilon = probe.step_over(epsilon, problem, self.step)
        moved = ops.finite_difference_labels(plus, minus, labels, epsilon, step=step, project=self._labels.project)
        return Refined(moved, moved.new_ones(len(moved)), moved.new_zeros(()))
