"""Label Gradient Alignment: settings of the label update."""

from dataclasses import dataclass

from fastmeta.presets import choose


@dataclass(frozen=True)
class LabelGradientAlignmentPreset:
    """Arguments of :class:`fastmeta.LabelGradientAlignment`."""

    epsilon: float


# The paper prints epsilon, for its toy problem, and neither decays nor learning rates; there is no published code.
PRESETS = {"paper": LabelGradientAlignmentPreset(epsilon=1e-3)}


def preset(name: str) -> LabelGradientAlignmentPreset:
    """Settings of the ``paper``.

    >>> preset("paper").epsilon
    0.001
    """
    return choose(PRESETS, name, "LabelGradientAlignment")
