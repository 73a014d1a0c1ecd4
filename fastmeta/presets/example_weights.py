"""Not All Unlabeled Data Are Equal: CIFAR-10 and SVHN (Tables 1 and 3, Figs. 3 and 4), IMDb, and ImageNet.

CIFAR-10 and SVHN with UDA and with FixMatch (CTAugment). Of the paper (Section 4): WRN-28-2, 1,024 validation images,
which are the weights' hold-out images, an update of the weights every N = 100 steps by Masked Adam at 0.01, the inverse
Hessian of the last layer. Of the code: FixMatch's loop (64 labeled and 448 unlabeled images, the labeled ones among
them, SGD at 0.03 with Nesterov's momentum 0.9 and a cosine to 7/16, 2^20 steps, a decay of 5e-4 of the kernels, an
average of 0.999, threshold 0.95, flips but for SVHN, the median of the last 20 evaluations), 448 hold-out images drawn
with replacement, weights in [0, 2], and that CTAugment's rates never learn. The weights learn as in the code
(``example-weights-published``; the paper's own settings are ``fastmeta.methods.example_weights.preset("paper")`` with
``fresh=True``). Chosen here: SVHN without its extra images; UDA's settings, which are those of its own code for images
(threshold 0.8, temperature 0.4, RandAugment), in FixMatch's loop and without training signal annealing; of Fig. 4 the
rates of Adam and SGD, and that Figs. 3 and 4 (centre) have 4,000 labels as Table 3 has. The rows of other methods are
cited from other papers: Pseudo-Label, VAT, mean teacher and MixMatch from MixMatch's, in whose loop they are here;
ReMixMatch is in that loop with its own settings; UDA and FixMatch in FixMatch's, with 5,000 validation images.

IMDb (Table 2, see :mod:`fastmeta.presets.reviews`): 20 more labels are the hold-out texts.

ImageNet with 10% of the labels is a run that no paper has. The loop is that of FixMatch's published code for ImageNet:
ResNet-50 at 224 pixels, 1,024 labeled and 5,120 unlabeled images, RandAugment, threshold 0.7, unlabeled weight 10, SGD
with Nesterov's momentum 0.9 at 0.4 (0.1 for 256 labeled images), a tenth every 500 of 3,000 passes of the labeled
images, 50 of them to warm up, an average of 0.999, and a decay that adds 3e-4 |w|^2 to the loss, so 6e-4 here. Without
weights its paper reports 28.54% top-1 and 10.87% top-5 error. Chosen here: 10 of the 128 labels of a class are the
hold-out images, 1,024 of them for an update; conjugate gradients to a residual of 1%, because the 2 million unknowns of
1,000 classes have no dense Hessian; damping 0.1; the weights of a step are those after its update.
"""

from dataclasses import replace
from typing import Any

from fastmeta.data import AugmentationConfig
from fastmeta.presets import imagenet, mixmatch, reviews
from fastmeta.presets.preset import Column, Preset, columns, joined, rows
from fastmeta.training.config import (
    AverageConfig,
    EvaluationConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    SplitConfig,
)

PAPER = "Not All Unlabeled Data Are Equal"
_CITED = "Cited from another paper."
_PREFIX = "weights"
_ALL = tuple(column for dataset in ("cifar-10", "svhn") for column in columns(dataset, 250, 500, 1000, 2000, 4000))
_THREE = tuple(column for column in _ALL if column.labels in (250, 1000, 4000))
_TWO = tuple(column for column in _ALL if column.labels in (250, 4000))
_CIFAR_10, _CIFAR_10_4000 = _ALL[:5], _ALL[4:5]

_TABLE_1_CITED = {
    "pl-alone": (49.98, 40.55, 30.91, 21.96, 16.21, 21.16, 14.35, 10.19, 7.54, 5.71),
    "vat-alone": (36.03, 26.11, 18.64, 14.40, 11.05, 8.41, 7.44, 5.98, 4.85, 4.20),
    "mt-alone": (47.32, 42.01, 17.32, 12.17, 10.36, 6.45, 3.82, 3.75, 3.51, 3.39),
    "mm-alone": (11.08, 9.65, 7.75, 7.03, 6.24, 3.78, 3.64, 3.27, 3.04, 2.89),
    "uda-alone": (8.76, 6.68, 5.87, 5.51, 5.29, 2.76, 2.70, 2.55, 2.57, 2.47),
}
_TABLE_1 = {
    "uda": (5.53, 5.38, 5.17, 5.14, 4.75, 2.45, 2.39, 2.33, 2.32, 2.35),
}
_TABLE_1_THREE_CITED = {"remixmatch-alone": (6.27, 5.73, 5.14, 3.10, 2.83, 2.42)}
_TABLE_1_THREE = {
    "fixmatch-alone": (5.23, 4.82, 4.48, 2.77, 2.41, 2.17),  # FixMatch*: reproduced by this paper
    "fixmatch": (5.05, 4.68, 4.35, 2.63, 2.34, 2.15),
}
_TABLE_1_FIXMATCH = {"fixmatch-alone": (5.07, 4.31, 2.64, 2.36)}  # of its own paper
_TABLE_2 = {"sl-alone": (39.40,), "uda-alone": (8.98,), "uda": (8.51,)}
_TABLE_3 = {
    "uda-30-steps": (5.13,),
    "uda-300-steps": (4.59,),
    "uda": (3.42,),
    "uda-rate-0.1": (6.16,),
    "uda-rate-0.001": (4.10,),
}
_FIGURE_3 = {"uda": (4.43,), "uda-identity": (4.51,), "uda-neumann": (4.85,)}
_FIGURE_4_LEFT = {"uda-single-weight": (None,) * 5}
_FIGURE_4_CENTRE = {"uda-adam": (None,), "uda-sgd": (None,)}
_FIGURE_4_RIGHT = {"uda-validation-64": (None,) * 2, "uda-validation-5000": (None,) * 2}

_FORMS: dict[str, dict[str, Any]] = {
    "": {},
    "30-steps": {"interval": 30},
    "300-steps": {"interval": 300},
    "rate-0.1": {"lr": 0.1},
    "rate-0.001": {"lr": 0.001},
    "identity": {"inverse_hessian": "identity"},
    # The last block of the net and the classifier, as the memory of the paper's GPU allowed.
    "neumann": {
        "how": "jvp",
        "inverse_hessian": "neumann",
        "bias": True,
        "passes": "own",
        "layers": ["net.blocks.8", "net.blocks.9", "net.blocks.10", "net.blocks.11", "net.fc"],
    },
    "single-weight": {"shared": True},
    "adam": {"optimizer": "adam"},
    "sgd": {"optimizer": "sgd"},
}
_BASES: dict[str, dict[str, Any]] = {
    "uda": {"base": "uda", "base_settings": {"threshold": 0.8, "temperature": 0.4, "weight": 1.0}},
    "fixmatch": {"base": "fixmatch", "base_settings": {"threshold": 0.95, "weight": 1.0}},
}


def _small(arm: str, column: Column) -> RunConfig:
    """``uda-validation-64``: base and what is otherwise; ``-alone``: without weights."""
    base, _, form = arm.partition("-")
    dataset = column.dataset
    if base == "remixmatch":
        return _remixmatch(dataset)
    if base not in _BASES:
        loop = mixmatch.loop(dataset, decay=mixmatch.decay_of(base, dataset))
        return replace(loop, **mixmatch.base_of(base, dataset))
    views = AugmentationConfig(
        "randaugment-google" if base == "uda" else "ctaugment", dataset != "svhn", shift=4, padding="reflected"
    )
    config = RunConfig(
        model="wrn-28-2",
        image_size=32,
        views="pictures",
        augmentation=views,
        labeled_view="weak",
        labeled_batch=64,
        unlabeled_batch=448,
        steps=2**20,
        optimizer=OptimizerConfig("sgd", learning_rate=0.03, weight_decay=5e-4, decayed="kernels"),
        schedule=ScheduleConfig("cosine-7/16"),
        average=AverageConfig(decay=0.999),
        evaluation=EvaluationConfig(every=1024, weights="average", report="median-of-last-20"),
        split=SplitConfig(labeled_in_unlabeled=True),
        **_BASES[base],
    )
    if form == "alone":
        return replace(config, split=replace(config.split, validation=5_000))
    holdout = 1024
    if form.startswith("validation-"):
        holdout, form = int(form.removeprefix("validation-")), ""
    return replace(
        config,
        augmentation=replace(views, adapt=views.strong != "ctaugment"),
        method="example-weights-published",
        method_settings=_FORMS[form],
        split=replace(config.split, holdout=holdout),
        holdout_batch=448,
    )


def _imdb(arm: str, column: Column) -> RunConfig:
    base, _, form = arm.partition("-")
    config = reviews.loop(base)
    if form == "alone":
        return config
    return replace(config, method="example-weights-published", split=SplitConfig(holdout_per_class=10))


def _remixmatch(dataset: str) -> RunConfig:
    """Its paper's settings: 8 strong views of CTAugment, also of the labeled images, weights 1.5, 0.5 and 0.5."""
    config = mixmatch.loop(dataset)
    settings = {"views": 8, "weight": 1.5, "unmixed_weight": 0.5, "rotation_weight": 0.5, "statistics": "interleaved"}
    return replace(
        config,
        base="remixmatch",
        base_settings=settings,
        augmentation=replace(config.augmentation, strong="ctaugment", cutout=False),
        labeled_view="strong",
    )


def _imagenet(arm: str, column: Column) -> RunConfig:
    epoch = imagenet.steps_of(1, imagenet.CLASSES * imagenet.per_class(0.1), 1024)
    return RunConfig(
        split=SplitConfig(holdout_per_class=_HOLDOUT),
        base="fixmatch",
        base_settings={"threshold": 0.7, "weight": 10.0},
        method="example-weights",
        method_settings={"interval": 100, "lr": 0.01, "inverse_hessian": "cg", "damping": 0.1, "tol": 1e-2},
        model="resnet-50",
        image_size=224,
        views="pictures",
        augmentation=AugmentationConfig(strong="randaugment-google"),
        labeled_view="weak",
        labeled_batch=1024,
        unlabeled_batch=5120,
        holdout_batch=1024,
        steps=3000 * epoch,
        optimizer=OptimizerConfig("sgd", learning_rate=0.4, weight_decay=6e-4, decayed="kernels"),
        schedule=ScheduleConfig(
            "steps", warm_up=50 * epoch, milestones=tuple(500 * k * epoch for k in range(1, 6)), factor=0.1
        ),
        average=AverageConfig(decay=0.999),
        evaluation=EvaluationConfig(every=50 * epoch, weights="both", report="last"),
    )


_HOLDOUT = 10
_TEN_PERCENT = [Column("imagenet", imagenet.CLASSES * (imagenet.per_class(0.1) - _HOLDOUT), "10pct")]

PRESETS: dict[str, Preset] = joined(
    [
        *rows(PAPER, _PREFIX, "Table 1", _ALL, _TABLE_1_CITED, _small, _CITED),
        *rows(PAPER, _PREFIX, "Table 1", _ALL, _TABLE_1, _small),
        *rows(PAPER, _PREFIX, "Table 1", _THREE, _TABLE_1_THREE_CITED, _small, _CITED),
        *rows(PAPER, _PREFIX, "Table 1", _THREE, _TABLE_1_THREE, _small),
        *rows(PAPER, _PREFIX, "Table 1", _TWO, _TABLE_1_FIXMATCH, _small, "In FixMatch's own paper."),
        *rows(PAPER, _PREFIX, "Table 2", columns("imdb", reviews.LABELS), _TABLE_2, _imdb),
        *rows(PAPER, _PREFIX, "Table 3", _CIFAR_10_4000, _TABLE_3, _small, "A validation error."),
        *rows(PAPER, _PREFIX, "Fig. 3", _CIFAR_10_4000, _FIGURE_3, _small),
        *rows(PAPER, _PREFIX, "Fig. 4", _CIFAR_10, _FIGURE_4_LEFT, _small),
        *rows(PAPER, _PREFIX, "Fig. 4", _CIFAR_10_4000, _FIGURE_4_CENTRE, _small),
        *rows(PAPER, _PREFIX, "Fig. 4", _TWO[:2], _FIGURE_4_RIGHT, _small),
        *rows(PAPER, _PREFIX, "nowhere", _TEN_PERCENT, {"fixmatch": (None,)}, _imagenet),
    ]
)
