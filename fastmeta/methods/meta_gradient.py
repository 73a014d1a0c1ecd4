"""Semi-Supervised Learning with Meta-Gradient (Zhang, Xiao, Jia, Cheng, Yang)."""

from dataclasses import asdict
from typing import Any, Literal

from torch import Tensor

from fastmeta import checks, ops
from fastmeta.derivatives import FiniteDifference, LabelGradient
from fastmeta.directions import HoldoutGradient
from fastmeta.methods.arguments import choice
from fastmeta.methods.base import Method
from fastmeta.presets import meta_gradient as presets
from fastmeta.problem import AnyProblem, Refined
from fastmeta.updates import LabelStep


class MetaGradient(Method):
    r"""One step on the labels down the labeled loss after an inner step of training on them.

    .. math:: \hat y_i = \tilde y_i - \beta\, \frac{\alpha}{B}\, 2 D_v p_i, \qquad v = \nabla L_{labeled}(\theta)

    (Eq. (6) with (13), inner loss ``|p - y|^2``). With ``derivative="finite_difference"`` the term ``2 D_v p`` is
    ``(p(theta + epsilon v) - p(theta - epsilon v)) / epsilon``, ``epsilon = radius / ||v||`` (Eq. (16)): a finite
    probe, not the derivative.

    Args:
        step: beta, the step on the labels. May be changed between calls, to follow a schedule.
        rate: alpha of the inner step, which then is on a mean over the batch. None leaves out ``alpha / B``, as
            Algorithm 2 and the code do: the step is then ``step * 2 D_v p`` for a batch of any size.
        derivative: ``exact`` or ``finite_difference``.
        radius: length of the perturbation of the last layer.
        project: clip at 0 and divide by the row sum; a row left all 0 becomes uniform.

    Raises:
        ValueError: an option is not one of those named, or a number is negative.
    """

    def __init__(
        self,
        *,
        step: float = 0.1,
        rate: float | None = None,
        derivative: Literal["exact", "finite_difference"] = "exact",
        radius: float = 0.01,
        project: bool = True,
    ) -> None:
        choice(derivative, "derivative", "exact", "finite_difference")
        checks.number(radius, "radius", low=0.0)
        alpha = 1.0 if rate is None else checks.number(rate, "rate", low=0.0)
        gradient: LabelGradient | FiniteDifference
        if derivative == "exact":
            gradient = LabelGradient(rate=alpha, reduction="sum" if rate is None else "mean")
        else:
            gradient = FiniteDifference(radius=radius, rate=alpha, reduction="sum" if rate is None else "mean")
        self._labels = LabelStep(step=checks.number(step, "step"), project=project)
        super().__init__(HoldoutGradient(), gradient, self._labels)

    @property
    def step(self) -> float:
        """Beta, the step on the labels."""
        return self._labels.step

    @step.setter
    def step(self, value: float) -> None:
        self._labels.step = checks.number(value, "step")

    @classmethod
    def from_preset(cls, name: Literal["paper", "official_code"], **overrides: Any) -> "MetaGradient":
        """The settings of the slides or of the published code; ``overrides`` are arguments of the constructor.

        Raises:
            ValueError: unknown preset.
            TypeError: unknown override.

        >>> MetaGradient.from_preset("official_code", step=0.03).step
        0.03
        """
        return cls(**{**asdict(presets.preset(name)), **overrides})

    def _step(self, problem: AnyProblem, index: Tensor | None) -> Refined | Tensor:
        probe = self.derivative
        if not isinstance(probe, FiniteDifference) or problem.inner_weights is not None:
            return super()._step(problem, index)
        # The same step in one kernel.
        plus, minus, epsilon = probe.probes(problem, self.direction(problem))
        labels = problem.labels
        step = self.step * probe.scale(problem, len(labels))
        moved = ops.finite_difference_labels(plus, minus, labels, epsilon, step=step, project=self._labels.project)
        return Refined(moved, moved.new_ones(len(moved)), moved.new_zeros(()))
