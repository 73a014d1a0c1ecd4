"""The baselines of MixMatch's code (Berthelot et al., 2019), on which two of the papers build, with its settings.

WRN-28-2, batches of 64, 2^20 steps of Adam at 0.002, weights that decay by themselves, an average of 0.999, 5,000
validation images, unlabeled images without the labeled ones, the median of the last 20 evaluations. Unlabeled losses
rise linearly over 0.4 of training. Squared errors are means over the classes there and sums here, hence weights over C.
"""

from typing import Any

from fastmeta.presets.data import DATA_SETS
from fastmeta.training.config import (
    AverageConfig,
    EvaluationConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    SplitConfig,
)

STEPS = 2**20
EPOCH = 1024  # steps from one evaluation to the next
VALIDATION = 5_000

PROTOCOL = RunConfig(
    model="wide-resnet-28-2",
    image_size=32,
    views="pictures",
    labeled_view="weak",
    labeled_batch=64,
    unlabeled_batch=64,
    steps=STEPS,
    optimizer=OptimizerConfig("adam", learning_rate=0.002, weight_decay=0.02, decoupled=True, decayed="kernels"),
    schedule=ScheduleConfig("constant"),
    average=AverageConfig(decay=0.999),
    evaluation=EvaluationConfig(every=EPOCH, weights="average", report="median-of-last-20"),
)


def split_of(dataset: str) -> SplitConfig:
    """With the validation images of that code, as many of each class."""
    return SplitConfig(validation_per_class=VALIDATION // DATA_SETS[dataset].classes)


def base_of(arm: str, dataset: str) -> tuple[str, dict[str, Any]]:
    """A base and its settings there: the table of that code's flags, of CIFAR and of SVHN where the two differ."""
    svhn, classes = dataset.startswith("svhn"), DATA_SETS[dataset].classes
    linear: dict[str, Any] = {"ramp": 0.4, "ramp_shape": "linear"}
    bases: dict[str, tuple[str, dict[str, Any]]] = {
        "pl": ("pseudo-label", {"threshold": 0.95, "weight": 2.0 if svhn else 1.0, **linear}),
        "vat": ("vat", {"radius": 6.0, "weight": 0.3, "entropy_weight": 0.06}),
        "mt": ("mean-teacher", {"weight": (150.0 if svhn else 50.0) / classes, **linear}),
    }
    return bases[arm]
