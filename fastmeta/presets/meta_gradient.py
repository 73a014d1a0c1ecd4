"""Meta-Gradient: settings of its label step, and of the loop around it."""

from dataclasses import dataclass
from typing import Literal

from fastmeta import checks
from fastmeta.presets import choose

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
    return choose({"paper": _PAPER, "official_code": _CODE}, name, "MetaGradient")


def training(name: str) -> TrainingPreset:
    """The loop of the ``paper`` (slides, no ramp) or of the ``official_code`` (a ramp of 4,000 of 400,000 steps).

    >>> training("official_code").scheduled
    'step'
    """
    presets = {
        "paper": TrainingPreset(scheduled="rate", ramp=0.0),
        "official_code": TrainingPreset(scheduled="step", ramp=0.01),
    }
    return choose(presets, name, "MetaGradient")
