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
    # Eq. (16) has alpha / B before the difference; alpha is the learning rate, 0.1. The slides print no beta: 128, the
    # batch size over alpha's share of Algorithm 2, is the one for which Eq. (6) and the code make the same step there.
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
