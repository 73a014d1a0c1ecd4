"""Meta-Gradient: settings of its label step."""

from dataclasses import dataclass
from typing import Literal

from fastmeta.presets import choose


@dataclass(frozen=True)
class MetaGradientPreset:
    """Arguments of :class:`fastmeta.MetaGradient`."""

    step: float
    rate: float | None
    project: bool
    derivative: Literal["exact", "finite_difference"] = "finite_difference"
    radius: float = 0.01


PRESETS = {
    # Eq. (16) has alpha / B before the difference; alpha is the learning rate, 0.1. The slides print no beta: with 128
    # the step is that of the code, 0.1, at its batch size of 128.
    "paper": MetaGradientPreset(step=128.0, rate=0.1, project=False),
    # train_meta.py: beta is the learning rate, no alpha / B, then relu and division by the row sum.
    "official_code": MetaGradientPreset(step=0.1, rate=None, project=True),
}


def preset(name: str) -> MetaGradientPreset:
    """Settings of the ``paper`` (slides) or of the ``official_code``.

    >>> preset("official_code").project
    True
    """
    return choose(PRESETS, name, "MetaGradient")
