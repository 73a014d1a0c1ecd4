"""Base semi-supervised algorithms, one file each."""

from fastmeta.ssl.alignment import Alignment
from fastmeta.ssl.base import Algorithm, Refiner, StepLoss, TrainingBatch
from fastmeta.ssl.fixmatch import FixMatch
from fastmeta.ssl.flexmatch import FlexMatch
from fastmeta.ssl.freematch import FreeMatch
from fastmeta.ssl.labels import kl_divergence
from fastmeta.ssl.mean_teacher import MeanTeacher
from fastmeta.ssl.mix_up_consistency import MixUpConsistency
from fastmeta.ssl.mix_up_guesses import MixUp
from fastmeta.ssl.mixing import Mixed, mix_up
from fastmeta.ssl.mixmatch import MixMatch
from fastmeta.ssl.pi_model import PiModel
from fastmeta.ssl.pseudo_label import PseudoLabel
from fastmeta.ssl.remixmatch import ReMixMatch
from fastmeta.ssl.supervised import Supervised
from fastmeta.ssl.translation_consistency import TranslationConsistency
from fastmeta.ssl.uda import UDA
from fastmeta.ssl.virtual_adversarial import VirtualAdversarial, virtual_adversarial_loss

Base = (
    Supervised
    | PseudoLabel
    | PiModel
    | MeanTeacher
    | VirtualAdversarial
    | MixUp
    | MixMatch
    | ReMixMatch
    | UDA
    | FixMatch
    | FlexMatch
    | FreeMatch
    | MixUpConsistency
    | TranslationConsistency
)

BASES: dict[str, type[Base]] = {
    "supervised": Supervised,
    "pseudo-label": PseudoLabel,
    "pi-model": PiModel,
    "mean-teacher": MeanTeacher,
    "vat": VirtualAdversarial,
    "mix-up": MixUp,
    "mixmatch": MixMatch,
    "remixmatch": ReMixMatch,
    "uda": UDA,
    "fixmatch": FixMatch,
    "flexmatch": FlexMatch,
    "freematch": FreeMatch,
    "mix-up-consistency": MixUpConsistency,
    "translation-consistency": TranslationConsistency,
}

__all__ = [
    "BASES",
    "UDA",
    "Algorithm",
    "Alignment",
    "Base",
    "FixMatch",
    "FlexMatch",
    "FreeMatch",
    "MeanTeacher",
    "MixMatch",
    "MixUp",
    "MixUpConsistency",
    "Mixed",
    "PiModel",
    "PseudoLabel",
    "ReMixMatch",
    "Refiner",
    "StepLoss",
    "Supervised",
    "TrainingBatch",
    "TranslationConsistency",
    "VirtualAdversarial",
    "kl_divergence",
    "mix_up",
    "virtual_adversarial_loss",
]
