"""Learning to Impute: settings of its inner and outer step on CIFAR-10 with the last layer alone."""

from dataclasses import dataclass, replace
from typing import Literal

from fastmeta.presets import choose
from fastmeta.problem import Reduction


@dataclass(frozen=True)
class L2IPreset:
    """Arguments of :class:`fastmeta.L2I`."""

    variant: Literal["V1", "V2"]
    rate: float
    labeled_weight: float
    label_space: Literal["probabilities", "logits"]
    project: bool
    label_step: float = 1.0
    weight: float = 1.0
    inner_loss: str = "mse_probs"
    reduction: Reduction = "sum"
    look_ahead: bool = True
    unit_length: bool = False


# Algorithm 1: the inner step is on C^T + C^U, both sums (Eq. (1), (2)), and V1 steps on z itself with no projection.
# Neither paper prints the inner rate or the label step ("tuned"); they are the code's.
_PAPER = L2IPreset(variant="V2", rate=0.1, labeled_weight=1.0, label_space="probabilities", project=False)
# train-L2I-O.py and train-L2I-L.py: C^U alone, and V1 steps on the logits of the labels.
_CODE = L2IPreset(variant="V2", rate=0.1, labeled_weight=0.0, label_space="logits", project=True)


def preset(name: str, variant: str) -> L2IPreset:
    """Settings of the ``paper`` or of the ``official_code`` for ``V1`` (there "L") or ``V2`` ("O").

    >>> preset("paper", "V2").labeled_weight, preset("official_code", "V2").labeled_weight
    (1.0, 0.0)
    """
    chosen = choose({"paper": _PAPER, "official_code": _CODE}, name, "L2I")
    # The inner rate is 50 times the outer one (0.002) in V2, 100 times in V1.
    return replace(chosen, variant="V1", rate=0.2) if variant == "V1" else chosen
