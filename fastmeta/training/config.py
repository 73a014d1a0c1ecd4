"""One run's settings."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastmeta.ssl import BASES
from fastmeta.training.recipes import METHODS, settings_of


@dataclass(frozen=True)
class RunConfig:
    """One base algorithm, one method, one seed.

    The defaults were chosen on validation images only, by seeds that no report uses; :mod:`fastmeta.training.recipes`
    says what was tried.
    """

    base: str = "fixmatch"
    """Base algorithm; vat is virtual adversarial training."""
    method: str = "none"
    """Method on top of it."""
    labels: int = 1
    """Labeled images per class."""
    seed: int = 0
    """Seed of the split, the initialization, the data order and the augmentation."""
    steps: int = 1000
    """Training steps."""
    labeled_batch: int = 40
    """Labeled images in a step (repeated, differently augmented, when there are fewer)."""
    unlabeled_batch: int = 120
    """Unlabeled images in a step."""
    learning_rate: float = 0.2
    """Peak learning rate, decayed as cos(7 pi k / 16 K)."""
    weight_decay: float = 5e-4
    """L2 penalty of the optimizer."""
    ema_decay: float = 0.99
    """Decay of the averaged weights."""
    evaluate_every: int = 50
    """Steps between evaluations."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    labeled_view: str = "strong"
    """Augmentation of the labeled images, weak or strong: with few of them, weak views are soon known by heart."""
    device: str = "cpu"
    """Where to train: cpu or cuda."""

    def __post_init__(self) -> None:
        _one_of("base", self.base, BASES)
        _one_of("method", self.method, METHODS)
        if self.method != "none" and not BASES[self.base].imputes:
            raise ValueError(f"method must be none for base {self.base} (it imputes no labels), got {self.method!r}")
        for name in ("labels", "steps", "labeled_batch", "unlabeled_batch", "evaluate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        _one_of("labeled_view", self.labeled_view, {"weak": None, "strong": None})
        _one_of("device", self.device, {"cpu": None, "cuda": None})
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device must be cpu where torch sees no GPU, got 'cuda'")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be above 0 and finite, got {self.learning_rate}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be at least 0 and finite, got {self.weight_decay}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")

    @property
    def arm(self) -> str:
        """Base and method as tables name them: ``fixmatch``, ``fixmatch + l2i``."""
        return self.base if self.method == "none" else f"{self.base} + {self.method}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON: these settings, and those of the base and the method."""
        return {**asdict(self), **settings_of(self.base, self.method)}


def _one_of(name: str, value: str, choices: dict[str, Any]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
