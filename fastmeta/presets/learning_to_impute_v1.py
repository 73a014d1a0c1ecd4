"""Learning to Impute, first version: CIFAR-10 and CIFAR-100 (Tables 2 to 4, Fig. 6), Tiny-ImageNet (Table 5).

13-layer net (Table 2, "Experiment 2" of A.2, and Table 4, Fig. 6). Of the paper: batches of 50 images of each kind and
Adam at 0.003 on CIFAR-10, batches of 128 on CIFAR-100, 40,000 steps, an average of 0.999, an unlabeled weight that
rises linearly to 75 in 16,000 steps, labels by a softmax on another view with the squared error between both ("PL", for
the baseline, too: with a weight of 75 that is the Pi-model whose labels are constants), the median of the last 20
epochs. Chosen here: 0.003 on CIFAR-100, too.

WRN-28-2 (Table 3, "Experiment 3"). Of the paper: batches of 32 on CIFAR-10 and 128 on CIFAR-100, Adam at 0.002,
weights and ramps of MixMatch's code. Of the published code: everything that :mod:`fastmeta.presets.impute` and
:mod:`fastmeta.presets.learning_to_impute_v2` take from it. The rows of other methods are cited by the paper from
MixMatch's, in whose loop they are here.

Both: 5,000 validation images, unlabeled images without the labeled ones, flips and crops, weight decay 0.02, which is
the factor of the learning rate in MixMatch's code, and the exact rule. Separate hold-out images (Table 4) are as many
as the labeled ones, and come from other images.

Tiny-ImageNet (A.3). Of the paper: ResNet-26, 5% of the labels, batches of 512, 120 epochs, Adam at 0.001, a tenth of
it at epoch 80 and a hundredth at 100, a weight that rises to 100 in 48 epochs, Eq. (6) at the last layer. Chosen here:
that an epoch is a pass of the unlabeled images; weight decay 0.02 and an average of 0.999 as above.
"""

from dataclasses import replace
from typing import Any

from fastmeta.presets import impute, mixmatch
from fastmeta.presets.preset import CLASSES, Column, Preset, columns, joined, rows
from fastmeta.training.config import RunConfig, ScheduleConfig

PAPER = "Learning to Impute, first version"
_CITED = "Cited from MixMatch's paper."
_PREFIX = "l2i-v1"
_CIFAR_10 = columns("cifar-10", 250, 500, 1000)
_CIFAR = (*_CIFAR_10, *columns("cifar-100", 500, 1000, 2000))

_TABLE_2 = {
    "sl-alone": (57.95, 46.06, 37.21, 88.23, 82.32, 72.08),
    "pl-alone": (45.19, 36.58, 27.19, 85.00, 76.30, 67.32),
    "pl-v1": (43.74, 35.76, 26.46, 84.41, 75.67, 66.03),
    "pl-v2": (42.51, 35.43, 26.38, 84.04, 75.12, 64.37),
}
_TABLE_3_CITED = {
    "pi-wrn-alone": (53.02, 41.82, 31.53),
    "pl-wrn-alone": (49.98, 40.55, 30.91),
    "mixup-alone": (47.43, 36.17, 25.72),
    "vat-alone": (36.03, 26.11, 18.68),
}
_TABLE_3 = {
    "mt-alone": (38.90, 28.45, 19.36, 88.44, 76.78, 64.01),
    "mt-v1": (34.72, 27.25, 18.07, 87.05, 75.84, 62.88),
    "mt-v2": (27.72, 21.05, 14.93, 85.96, 75.24, 61.45),
    "mm-alone": (12.33, 10.14, 8.68, 78.06, 65.45, 51.14),
    "mm-v1": (11.60, 10.24, 9.60, 76.90, 63.62, 50.53),
    "mm-v2": (10.92, 10.80, 9.54, 71.82, 61.98, 51.73),
}
_TABLE_4 = {
    **_TABLE_2,
    "pl-v1-separate": (43.26, 34.77, 26.95, 84.18, 75.96, 65.41),
    "pl-v2-separate": (38.07, 33.12, 25.44, 80.68, 75.80, 65.83),
}
_TABLE_5 = {
    "mt-alone": (81.62,),
    "mt-v1": (80.52,),
    "mt-v2": (80.63,),
    "mm-alone": (77.70,),
    "mm-v1": (77.32,),
    "mm-v2": (76.72,),
}
_FIGURE_6 = {
    "pl-v1-holdout-25": (43.4,),
    "pl-v1": (43.74,),
    "pl-v1-holdout-100": (43.72,),
    "pl-v2-holdout-25": (42.7,),
    "pl-v2": (42.51,),
    "pl-v2-holdout-100": (42.47,),
}


def _conv_net(arm: str, column: Column) -> RunConfig:
    """``pl-v1-separate``: base, variant and what is otherwise."""
    base, variant, other = (*arm.split("-", 2), "")[:3]
    batch = 50 if column.dataset == "cifar-10" else 128
    config = mixmatch.loop(column.dataset)
    config = replace(
        config,
        model="conv-large-top-norm",
        labeled_batch=batch,
        unlabeled_batch=batch,
        steps=40_000,
        optimizer=replace(config.optimizer, learning_rate=0.003),
        evaluation=replace(config.evaluation, every=1000),
        base="supervised" if base == "sl" else "pi-model",
        base_settings={} if base == "sl" else {"weight": 75.0, "ramp": 0.4, "ramp_shape": "linear", "learns": "second"},
    )
    if other.startswith("holdout-"):
        config = replace(config, holdout_batch=int(other.removeprefix("holdout-")))
    if other == "separate":
        labels = column.labels // CLASSES[column.dataset]
        split = replace(config.split, holdout_per_class=labels)
        config = replace(config, split=split, holdout_batch=batch)
    return _with_method(config, variant, {"holdout": "part"} if other == "separate" else {})


def _wide_resnet(arm: str, column: Column) -> RunConfig:
    base, variant, _ = (*arm.replace("wrn-", "").split("-"), "")[:3]
    config = mixmatch.loop(column.dataset)
    base_fields = mixmatch.base_of(base, column.dataset)
    if base in ("mt", "mm"):  # the paper's own runs
        batch = 32 if column.dataset == "cifar-10" else 128
        optimizer = replace(config.optimizer, decayed="all")
        config = replace(config, model="wrn-28-2-l2i", labeled_batch=batch, unlabeled_batch=batch, optimizer=optimizer)
        base_fields["base_settings"]["statistics"] = "interleaved"
    if base == "mt":
        config = replace(config, average=replace(config.average, delay=2.0))
    return _with_method(replace(config, **base_fields), variant, {})


def _tiny_imagenet(arm: str, column: Column) -> RunConfig:
    base, variant = arm.split("-")
    epoch = (100_000 - column.labels) // 512
    config = replace(mixmatch.loop(column.dataset), **mixmatch.base_of(base, column.dataset))
    weight = 100.0 / CLASSES[column.dataset] if base == "mt" else 100.0
    config = replace(
        config,
        model="resnet-26",
        image_size=64,
        augmentation=replace(config.augmentation, shift=8),
        labeled_batch=512,
        unlabeled_batch=512,
        steps=120 * epoch,
        base_settings={**config.base_settings, "weight": weight, "ramp": 0.4},
        optimizer=replace(config.optimizer, learning_rate=0.001),
        schedule=ScheduleConfig("steps", milestones=(80 * epoch, 100 * epoch)),
        evaluation=replace(config.evaluation, every=epoch),
        split=replace(config.split, validation_per_class=None),
    )
    return _with_method(config, variant, impute.APPROXIMATE)


def _with_method(config: RunConfig, variant: str, settings: dict[str, Any]) -> RunConfig:
    forms: dict[str, dict[str, Any]] = {"v1": impute.LEARNABLE, "v2": {}}
    return config if variant not in forms else replace(config, **impute.method(**settings, **forms[variant]))


PRESETS: dict[str, Preset] = joined(
    [
        *rows(PAPER, _PREFIX, "Table 2", _CIFAR, _TABLE_2, _conv_net),
        *rows(PAPER, _PREFIX, "Table 3", _CIFAR, _TABLE_3_CITED, _wide_resnet, _CITED),
        *rows(PAPER, _PREFIX, "Table 3", _CIFAR, _TABLE_3, _wide_resnet),
        *rows(PAPER, _PREFIX, "Table 4", _CIFAR, _TABLE_4, _conv_net),
        *rows(PAPER, _PREFIX, "Table 5", [Column("tiny-imagenet", 5_000, "5pct")], _TABLE_5, _tiny_imagenet),
        *rows(PAPER, _PREFIX, "Fig. 6", _CIFAR_10[:1], _FIGURE_6, _conv_net),
    ]
)
