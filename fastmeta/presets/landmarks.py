"""Learning to Impute, both versions: facial landmarks on AFLW (Table 1, and Tables 7 and 9 of the journal version).

Of the papers: TCDCN, 22,500 steps, SGD at 0.03 with momentum 0.9 and weight decay 5e-4, a tenth of the rate from step
15,000 on (the first version's "every 750 steps" is a slip), an unlabeled weight that rises linearly to 3 (the first
version: 1) in 9,000 steps, pseudo-labels by the net itself ("pl") or by its average ("mt"), 10% of the training images
for validation and early stopping, Eq. (6) in the journal version but for "exact", "L" for learnable labels.

Of the published code: batches of 128, pictures of 60 pixels shifted by up to 4 with reflection, targets standardized by
the labeled images, labeled images among the unlabeled ones, the inner loss on the tanh of both for outputs and on
numbers as they are for learnable labels, an inner rate of 10 times that of each step (once for learnable labels), all
losses means over the coordinates, too. Its default of 75 for the unlabeled weight is not the papers'.

Chosen here: an average of 0.999. The papers count 10,122 training and 2,991 test images; MTFL's lists have 10,000 and
2,995.
"""

from dataclasses import asdict
from typing import Any

from fastmeta.methods import l2i
from fastmeta.presets import impute
from fastmeta.presets.preset import Column, Preset, columns, joined, rows
from fastmeta.training.config import (
    AugmentationConfig,
    AverageConfig,
    EvaluationConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    SplitConfig,
)

_FIRST, _JOURNAL = "Learning to Impute, first version", "Learning to Impute, journal version"
_NOTE = "Of the distance between the eyes; the papers' lists are not quite those of MTFL."
_COLUMNS = columns("aflw", 91, 182, 455, 911)
_ALL = [Column("aflw", 0, "all")]

_FIRST_TABLE_1 = {
    "sl-alone": (16.41, 14.26, 11.83, 10.21),
    "pl-alone": (12.89, 11.52, 9.73, 9.03),
    "pl-v1": (11.90, 10.87, 9.55, 8.83),
    "pl-v2": (12.72, 11.44, 9.89, 8.92),
    "mt-alone": (12.83, 11.43, 9.76, 8.91),
    "mt-v1": (11.92, 10.73, 9.32, 8.60),
    "mt-v2": (12.52, 11.28, 9.80, 8.78),
}
_JOURNAL_TABLE_1 = {
    "sl-alone": (16.32, 14.21, 11.81),
    "pl-alone": (12.40, 10.77, 9.16),
    "pl": (11.72, 10.12, 8.94),
    "mt-alone": (12.80, 11.43, 9.46),
    "mt": (11.53, 10.32, 8.89),
}
_TABLE_7 = {"mt-exact": (11.70, 10.49, 9.07), "mt": (11.53, 10.32, 8.89)}
_TABLE_9 = {"mt-alone": (12.80, 11.43, 9.46), "mt": (11.53, 10.32, 8.89), "mt-l": (11.78, 10.34, 9.02)}


def _first(arm: str, column: Column) -> RunConfig:
    return _run(arm, 1.0, {"v1": ("V1", False), "v2": ("V2", False)})


def _journal(arm: str, column: Column) -> RunConfig:
    return _run(arm, 3.0, {"": ("V2", True), "exact": ("V2", False), "l": ("V1", True)})


def _run(arm: str, weight: float, forms: dict[str, tuple[str, bool]]) -> RunConfig:
    """An arm, ``mt-exact``: what imputes, then the variant of the method and whether it is Eq. (6)."""
    base, _, form = arm.partition("-")
    settings: dict[str, Any] = {}
    if form in forms:
        variant, approximate = forms[form]
        published = l2i.preset("official_code", variant, "landmarks")
        loop = l2i.training("official_code", variant, "landmarks")
        settings = asdict(published) | {"scheduled": "rate", "scheduled_factor": loop.rate_at(1.0)}
        settings |= impute.APPROXIMATE if approximate else {}
    return RunConfig(
        base="translation-consistency",
        base_settings={
            "weight": 0.0 if base == "sl" else weight,
            "ramp": 0.4,
            "ramp_shape": "linear",
            "imputer": "teacher" if base == "mt" else "student",
        },
        method="l2i-published" if settings else "none",
        method_settings=settings,
        model="tcdcn",
        image_size=60,
        augmentation=AugmentationConfig(shift=4, padding="reflected"),
        labeled_view="weak",
        labeled_batch=128,
        unlabeled_batch=128,
        steps=22_500,
        optimizer=OptimizerConfig("sgd", learning_rate=0.03, momentum=0.9, nesterov=False, weight_decay=5e-4),
        schedule=ScheduleConfig("steps", milestones=(15_000,), factor=0.1),
        average=AverageConfig(decay=0.999, delay=2.0),
        evaluation=EvaluationConfig(every=150, weights="average" if base == "mt" else "student"),
        split=SplitConfig(validation=1012, labeled_in_unlabeled=True),
    )


PRESETS: dict[str, Preset] = joined(
    [
        *rows(_FIRST, "l2i-v1", "Table 1", _COLUMNS, _FIRST_TABLE_1, _first, _NOTE),
        *rows(_FIRST, "l2i-v1", "Table 1", _ALL, {"sl-alone": (7.83,)}, _first, _NOTE),
        *rows(_JOURNAL, "l2i-v2", "Table 1", _COLUMNS, _JOURNAL_TABLE_1, _journal, _NOTE),
        *rows(_JOURNAL, "l2i-v2", "Table 1", _ALL, {"sl-alone": (7.71,)}, _journal, _NOTE),
        *rows(_JOURNAL, "l2i-v2", "Table 7", _COLUMNS, _TABLE_7, _journal, _NOTE),
        *rows(_JOURNAL, "l2i-v2", "Table 9", _COLUMNS, _TABLE_9, _journal, _NOTE),
    ]
)
