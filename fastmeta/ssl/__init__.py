"""Base semi-supervised algorithms, one file each."""

from fastmeta.ssl.base import Algorithm, Batch, Loss, Refiner
from fastmeta.ssl.fixmatch import FixMatch
from fastmeta.ssl.mean_teacher import MeanTeacher
from fastmeta.ssl.pseudo_label import PseudoLabel
from fastmeta.ssl.supervised import Supervised

BASES: dict[str, type[Supervised | PseudoLabel | MeanTeacher | FixMatch]] = {
    "supervised": Supervised,
    "pseudo-label": PseudoLabel,
    "mean-teacher": MeanTeacher,
    "fixmatch": FixMatch,
}

__all__ = [
    "BASES",
    "Algorithm",
    "Batch",
    "FixMatch",
    "Loss",
    "MeanTeacher",
    "PseudoLabel",
    "Refiner",
    "Supervised",
]
