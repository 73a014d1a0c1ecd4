"""The loop and the baselines of MixMatch's code (Berthelot et al., 2019), on which two of the papers build.

WRN-28-2, 64 labeled and 64 unlabeled images, 2^20 steps of Adam at 0.002, weights that decay by themselves, an average
of 0.999, flips and crops with reflected borders of 4 pixels (SVHN: no flips), 5,000 validation images, unlabeled images
without the labeled ones, the median error of the last 20 evaluations. Unlabeled losses rise linearly over 0.4 of
training, MixMatch's over 1/64. Chosen here: MixMatch's weight on CIFAR-100, which is that of its paper, and an
evaluation every 1,024 steps. Mean teacher's squared error is a mean over the C classes there and a sum here, hence its
weight over C; a radius is that of images in [-1, 1] there and in [0, 1] here, hence half of it. Label smoothing, which
the code has for some, is left out.
"""

from typing import Any

from fastmeta.data import AugmentationConfig
from fastmeta.presets.preset import CLASSES
from fastmeta.training.config import (
    AverageConfig,
    EvaluationConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    SplitConfig,
)

STEPS = 2**20
VALIDATION = 5_000


def loop(dataset: str, *, decay: float = 0.02) -> RunConfig:
    """All but base and method; ``decay`` is the code's ``wd``, which the learning rate multiplies."""
    return RunConfig(
        model="wrn-28-2",
        image_size=32,
        views="pictures",
        augmentation=AugmentationConfig(flip=not dataset.startswith("svhn"), shift=4, padding="reflected"),
        labeled_view="weak",
        labeled_batch=64,
        unlabeled_batch=64,
        steps=STEPS,
        optimizer=OptimizerConfig("adam", learning_rate=0.002, weight_decay=decay, decoupled=True, decayed="kernels"),
        schedule=ScheduleConfig("constant"),
        average=AverageConfig(decay=0.999),
        evaluation=EvaluationConfig(every=1024, weights="average", report="median-of-last-20"),
        split=SplitConfig(validation_per_class=VALIDATION // CLASSES[dataset]),
    )


def base_of(arm: str, dataset: str) -> dict[str, Any]:
    """A base and its settings, as fields of a RunConfig: the flags of that code, of CIFAR and of SVHN."""
    svhn, classes = dataset.startswith("svhn"), CLASSES[dataset]
    linear = {"ramp": 0.4, "ramp_shape": "linear", "statistics": "separate"}
    matched = 250.0 if svhn else 150.0 if dataset == "cifar-100" else 75.0
    base, settings = {
        "pl": ("pseudo-label", {"threshold": 0.95, "weight": 2.0 if svhn else 1.0, **linear}),
        "pi": ("pi-model", {"weight": 5.0 if svhn else 20.0, "learns": "second", **linear}),
        "mt": ("mean-teacher", {"weight": (150.0 if svhn else 50.0) / classes, **linear}),
        "vat": ("vat", {"radius": 3.0, "weight": 0.3, "entropy_weight": 0.06}),
        "mixup": ("mix-up", {"alpha": 0.25 if svhn else 0.75}),
        "mm": ("mixmatch", {"weight": matched, "alpha": 0.75, "temperature": 0.5, "statistics": "interleaved"}),
    }[arm]
    return {"base": base, "base_settings": settings}


def decay_of(arm: str, dataset: str) -> float:
    """The code's ``wd`` of a base."""
    svhn = dataset.startswith("svhn")
    return 0.2 if (arm == "pi" and svhn) or (arm == "mt" and not svhn) else 0.02
