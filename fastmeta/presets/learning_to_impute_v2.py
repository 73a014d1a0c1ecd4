"""Learning to Impute, journal version: CIFAR-10 and CIFAR-100 (Tables 2, 5, 6, 8 and 10), ImageNet (Table 3), IMDb
(Table 4, see :mod:`fastmeta.presets.reviews`).

CIFAR. Of the paper (Sections 5.3, 5.4, A.2): WRN-28-2, batches of 64, 5,000 validation images, unlabeled images
without the labeled ones, Adam at a fixed rate on CIFAR-10, SGD at 0.03 with momentum 0.9, weight decay 0.001 and a
cosine on CIFAR-100, an average of 0.999, the median of the last 20 epochs, flips and crops, RandAugment for FixMatch,
consistency weights and ramps of MixMatch's code, 1 for FixMatch; a hold-out batch of 64, drawn from the labeled images
anew; Eq. (6) but for "exact"; "L" for learnable labels. Of the published code, which has the mean teacher alone: the
net, Adam's rate of 0.002, 1,024 epochs of 1,024 steps, a decay of all parameters by 0.02 times the rate on CIFAR-10
(the paper prints 0.0004), batch statistics interleaved, a teacher that forgets its beginning, 1 - 1 / (t + 1), and all
of :mod:`fastmeta.presets.impute`. Chosen here: FixMatch's 448 unlabeled images and threshold 0.95; the inner rate on
CIFAR-100, which is that of CIFAR-10; that the separate hold-out images (40% of the labels) are not augmented. The rows
of other methods are cited by the paper from MixMatch's, in whose loop they are here.

ImageNet at 72 pixels with 5% of the labels. Of the paper (Section 5.3 and A.3): ResNet-26, 120 epochs, SGD at 0.1 with
Nesterov's momentum 0.9 and weight decay 1e-4, a tenth of the rate every 30 epochs, 256 labeled and 768 unlabeled
images (256 for MixMatch), an unlabeled weight of 10 (100), RandAugment as FixMatch has it, the median test error of the
last 20 epochs. Chosen here: that an epoch is a pass of the unlabeled images (of all where all have labels); FixMatch's
threshold of 0.7 for ImageNet; the average of 0.999 as FixMatch's; shifts by up to 9 pixels as weak views.
"""

from dataclasses import replace
from typing import Any

from fastmeta.data import AugmentationConfig
from fastmeta.presets import imagenet, impute, mixmatch, reviews
from fastmeta.presets.preset import CLASSES, Column, Preset, columns, joined, rows
from fastmeta.training.config import (
    AverageConfig,
    EvaluationConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
)

PAPER = "Learning to Impute, journal version"
_CITED = "Cited from MixMatch's paper."
_PREFIX = "l2i-v2"
_CIFAR_100 = columns("cifar-100", 500, 1000, 2000)
_CIFAR = (*columns("cifar-10", 250, 500, 1000), *_CIFAR_100)
_LABELS = imagenet.per_class(0.05)
_FIVE_PERCENT = Column("imagenet-72", imagenet.CLASSES * _LABELS, "5pct")

_TABLE_2_CITED = {
    "pi-alone": (53.02, 41.82, 31.53),
    "pl-alone": (49.98, 40.55, 30.91),
    "mixup-alone": (47.43, 36.17, 25.72),
    "vat-alone": (36.03, 26.11, 18.68),
}
_TABLE_2 = {
    "mt-alone": (37.75, 27.89, 19.15, 74.42, 61.94, 52.01),
    "mt": (25.97, 21.13, 14.76, 70.58, 58.96, 51.95),
    "mm-alone": (11.71, 10.41, 9.74, 74.67, 60.75, 50.26),
    "mm": (10.94, 10.36, 9.48, 68.37, 57.83, 50.33),
    "fm-alone": (5.70, 5.78, 5.55, 48.32, 40.68, 35.52),
    "fm": (5.56, 5.70, 5.38, 44.97, 39.21, 35.45),
}
_TABLE_3 = {"sl-alone": (73.88,), "mm-alone": (69.26,), "fm-alone": (59.55,), "fm": (56.30,)}
_TABLE_4 = {"sl-alone": (26.30,), "uda-alone": (9.82,), "uda": (9.19,)}
_TABLE_5 = {"fm-holdout-32": (44.67,), "fm": (44.97,), "fm-holdout-128": (45.78,)}
_TABLE_6 = {"fm": (44.97, 39.21, 35.45), "fm-separate": (45.27, 39.20, 35.49)}
_TABLE_8 = {
    "mt-exact": (27.72, 21.05, 14.93, 69.57, 59.25, 51.68),
    "mt": (25.97, 21.13, 15.76, 70.58, 58.96, 51.95),
}
_TABLE_10 = {
    "fm-alone": (5.70, 5.78, 5.55, 48.32, 40.68, 35.52),
    "fm": (5.56, 5.70, 5.38, 44.97, 39.21, 35.45),
    "fm-l": (5.63, 5.74, 5.43, 48.00, 40.33, 35.53),
}


def _cifar(arm: str, column: Column) -> RunConfig:
    """``mt-exact`` is the mean teacher with that form of the method."""
    base, _, form = arm.partition("-")
    config = replace(_loop(base, column.dataset), **_base(base, column.dataset))
    if form == "alone":
        return config
    settings: dict[str, Any] = {} if form == "exact" else dict(impute.APPROXIMATE)
    if form == "l":
        settings |= impute.LEARNABLE
    if form.startswith("holdout-"):
        config = replace(config, holdout_batch=int(form.removeprefix("holdout-")))
    if form == "separate":
        labels = column.labels // CLASSES[column.dataset]
        holdout = labels * 2 // 5
        split = replace(config.split, holdout_per_class=holdout)
        config = replace(config, labels_per_class=labels - holdout, split=split, holdout_batch=64)
        settings["holdout"] = "part"
    return replace(config, **impute.method(**settings))


def _loop(base: str, dataset: str) -> RunConfig:
    config = mixmatch.loop(dataset)
    if base in ("mt", "mm", "fm"):  # the paper's own runs
        config = replace(config, model="wrn-28-2-l2i", optimizer=replace(config.optimizer, decayed="all"))
        if dataset == "cifar-100":
            sgd = OptimizerConfig("sgd", learning_rate=0.03, momentum=0.9, weight_decay=1e-3, decayed="kernels")
            config = replace(config, optimizer=sgd, schedule=ScheduleConfig("cosine-7/16"))
    if base == "mt":
        config = replace(config, average=replace(config.average, delay=2.0))
    if base == "fm":
        strong = replace(config.augmentation, strong="randaugment-google")
        config = replace(config, unlabeled_batch=448, augmentation=strong)
    return config


def _base(base: str, dataset: str) -> dict[str, Any]:
    if base == "fm":
        return {"base": "fixmatch", "base_settings": {"threshold": 0.95, "weight": 1.0}}
    chosen = mixmatch.base_of(base, dataset)
    if base == "mt":
        chosen["base_settings"]["statistics"] = "interleaved"
    return chosen


def _imdb(arm: str, column: Column) -> RunConfig:
    base, _, form = arm.partition("-")
    config = reviews.loop(base)
    return config if form == "alone" else replace(config, holdout_batch=8, **impute.method(**impute.APPROXIMATE))


def _imagenet(arm: str, column: Column) -> RunConfig:
    base, _, form = arm.partition("-")
    bases: dict[str, tuple[str, dict[str, float], int]] = {
        "sl": ("supervised", {}, 256),
        "mm": ("mixmatch", {"weight": 100.0}, 256),
        "fm": ("fixmatch", {"threshold": 0.7, "weight": 10.0}, 768),
    }
    name, settings, batch = bases[base]
    epoch = imagenet.steps_of(1, imagenet.IMAGES - column.labels, batch)
    config = RunConfig(
        base=name,
        base_settings=settings,
        model="resnet-26",
        image_size=72,
        views="pictures",
        augmentation=AugmentationConfig(strong="randaugment-google" if base == "fm" else "auto"),
        labeled_view="weak",
        labeled_batch=256,
        unlabeled_batch=batch,
        steps=120 * epoch,
        optimizer=OptimizerConfig("sgd", learning_rate=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4),
        schedule=ScheduleConfig("steps", milestones=(30 * epoch, 60 * epoch, 90 * epoch), factor=0.1),
        average=AverageConfig(decay=0.999),
        evaluation=EvaluationConfig(every=epoch, weights="both", report="median-of-last-20"),
    )
    return config if form == "alone" else replace(config, **impute.method(**impute.APPROXIMATE))


PRESETS: dict[str, Preset] = joined(
    [
        *rows(PAPER, _PREFIX, "Table 2", _CIFAR, _TABLE_2_CITED, _cifar, _CITED),
        *rows(PAPER, _PREFIX, "Table 2", _CIFAR, _TABLE_2, _cifar),
        *rows(PAPER, _PREFIX, "Table 3", [Column("imagenet-72", 0, "all")], {"sl-alone": (35.90,)}, _imagenet),
        *rows(PAPER, _PREFIX, "Table 3", [_FIVE_PERCENT], _TABLE_3, _imagenet),
        *rows(PAPER, _PREFIX, "Table 4", columns("imdb", reviews.LABELS), _TABLE_4, _imdb),
        *rows(PAPER, _PREFIX, "Table 5", _CIFAR_100[:1], _TABLE_5, _cifar),
        *rows(PAPER, _PREFIX, "Table 6", _CIFAR_100, _TABLE_6, _cifar),
        *rows(PAPER, _PREFIX, "Table 8", _CIFAR, _TABLE_8, _cifar),
        *rows(PAPER, _PREFIX, "Table 10", _CIFAR, _TABLE_10, _cifar),
    ]
)
