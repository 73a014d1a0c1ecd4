"""Learning to Impute (journal version), Table 3: ImageNet at 72 pixels with 5% of the labels, FixMatch with L2I.

Top-1 error 56.30%, FixMatch alone 59.55%. Of the paper (Section 5 and A.3): ResNet-26, batches of 256 labeled and 768
unlabeled images, 120 epochs, SGD at 0.1 with Nesterov's momentum 0.9 and weight decay 1e-4, a tenth of the rate every
30 epochs, an unlabeled weight of 10, RandAugment as FixMatch has it, the median test error of the last 20 epochs.

Not published, chosen here: that an epoch is a pass of the unlabeled images; the threshold, FixMatch's 0.7 for ImageNet;
the average of the weights, 0.999 as FixMatch's; the hold-out batch, which is the labeled batch, as in the paper's other
experiments; and L2I's own settings, the variant included (``V2`` at the last layer, with the cross-entropy that is
trained). The strong view is that of ``views="pictures"`` and not RandAugment; crops are of 64 pixels from the 72.
"""

from fastmeta.presets import imagenet
from fastmeta.training.config import AverageConfig, EvaluationConfig, OptimizerConfig, RunConfig, ScheduleConfig

_LABELS = imagenet.per_class(0.05)
_EPOCH = imagenet.steps_of(1, imagenet.IMAGES - imagenet.CLASSES * _LABELS, 768)

IMAGENET = RunConfig(
    labels_per_class=_LABELS,
    base="fixmatch",
    base_settings={"threshold": 0.7, "weight": 10.0},
    method="l2i",
    method_settings={"variant": "V2", "how": "last_layer", "inner_loss": "cross_entropy", "weight": 1.0},
    model="resnet-26",
    image_size=72,
    views="pictures",
    labeled_view="weak",
    labeled_batch=256,
    unlabeled_batch=768,
    steps=120 * _EPOCH,
    optimizer=OptimizerConfig("sgd", learning_rate=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4),
    schedule=ScheduleConfig("steps", milestones=(30 * _EPOCH, 60 * _EPOCH, 90 * _EPOCH), factor=0.1),
    average=AverageConfig(decay=0.999),
    evaluation=EvaluationConfig(every=_EPOCH, weights="both", report="median-of-last-20"),
)
