"""Base semi-supervised algorithms, one file each."""

from fastmeta.ssl.base import Algorithm, Refiner, StepLoss, TrainingBatch, kl_divergence
from fastmeta.ssl.fixmatch import FixMatch
from fastmeta.ssl.mean_teacher import MeanTeacher
from fastmeta.ssl.mix_up import Mixed, mix_up
from fastmeta.ssl.mix_up_consistency import MixUpConsistency
from fastmeta.ssl.pseudo_label import PseudoLabel
from fastmeta.ssl.supervised import Supervised
from fastmeta.ssl.virtual_adversarial import VirtualAdversarial, virtual_adversarial_loss

Base = Supervised | PseudoLabel | MeanTeacher | FixMatch | VirtualAdversarial | MixUpConsistency

BASES: dict[str, type[Base]] = {
    "supervised": Supervised,
    "pseudo-label": PseudoLabel,
    "mean-teacher": MeanTeacher,
    "fixmatch": FixMatch,
    "vat": VirtualAdversarial,
    "mix-up-consistency": MixUpConsistency,
}

__all__ = [
    "BASES",
    "Algorithm",
    "Base",
    "FixMatch",
    "MeanTeacher",
    "MixUpConsistency",
    "Mixed",
    "PseudoLabel",
    "Refiner",
    "StepLoss",
    "Supervised",
    "TrainingBatch",
    "VirtualAdversarial",
    "kl_divergence",
    "mix_up",
    "virtual_adversarial_loss",
]
