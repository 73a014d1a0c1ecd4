"""Not All Unlabeled Data Are Equal on FixMatch's ImageNet with 10% of the labels: a run that no paper has.

The paper stops at CIFAR-10 and SVHN. The loop is that of FixMatch's published code for ImageNet: ResNet-50 at 224
pixels, 1,024 labeled and 5,120 unlabeled images, threshold 0.7, unlabeled weight 10, SGD with Nesterov's momentum 0.9
at 0.4 (0.1 for 256 labeled images), a tenth every 500 of 3,000 passes of the labeled images, 50 of them to warm up,
an average of 0.999, and a decay that adds 3e-4 |w|^2 to the loss, so 6e-4 here. Without weights its paper reports
28.54% top-1 and 10.87% top-5 error.

Of the weights' paper: an update every 100 steps by Masked Adam at 0.01, weights in [0, 2]. Chosen here: 10 of the 128
labels of a class are the validation images of the weights' update, 1,024 of them for an update; conjugate gradients to
a residual of 1%, because the 2 million unknowns of 1,000 classes have no dense Hessian; damping 0.1; the weights of a
step are those after its update. The strong view is that of ``views="pictures"`` and not RandAugment.
"""

from fastmeta.presets import imagenet
from fastmeta.presets.preset import Column, joined, rows
from fastmeta.training.config import (
    AverageConfig,
    EvaluationConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    SplitConfig,
)

_HOLDOUT = 10
_LABELS = imagenet.per_class(0.1)
_EPOCH = imagenet.steps_of(1, imagenet.CLASSES * _LABELS, 1024)

_IMAGENET = RunConfig(
    split=SplitConfig(holdout_per_class=_HOLDOUT),
    base="fixmatch",
    base_settings={"threshold": 0.7, "weight": 10.0},
    method="example-weights",
    method_settings={"interval": 100, "lr": 0.01, "inverse_hessian": "cg", "damping": 0.1, "tol": 1e-2},
    model="resnet-50",
    image_size=224,
    views="pictures",
    labeled_view="weak",
    labeled_batch=1024,
    unlabeled_batch=5120,
    holdout_batch=1024,
    steps=3000 * _EPOCH,
    optimizer=OptimizerConfig(
        "sgd", learning_rate=0.4, momentum=0.9, nesterov=True, weight_decay=6e-4, decayed="kernels"
    ),
    schedule=ScheduleConfig(
        "steps", warm_up=50 * _EPOCH, milestones=tuple(500 * k * _EPOCH for k in range(1, 6)), factor=0.1
    ),
    average=AverageConfig(decay=0.999),
    evaluation=EvaluationConfig(every=50 * _EPOCH, weights="both", report="last"),
)

PAPER = "Not All Unlabeled Data Are Equal"
_PREFIX = "weights"
_TEN_PERCENT = (Column("imagenet", imagenet.CLASSES * (_LABELS - _HOLDOUT), "10pct"),)

PRESETS = joined(rows(PAPER, _PREFIX, "nowhere", _TEN_PERCENT, {"fixmatch": (None,)}, lambda arm, dataset: _IMAGENET))
