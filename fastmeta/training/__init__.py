"""Trainers: the loop, runs on disk, comparisons of runs, and their reports.

A loop by hand; :func:`train` is what the command line does with a folder.

>>> from fastmeta import L2I
>>> from fastmeta.data import load_digits, split_digits, views_for
>>> from fastmeta.models import ConvNet
>>> from fastmeta.ssl import FixMatch, Refiner
>>> digits = load_digits()
>>> split = split_digits(digits, labels_per_class=1, seed=0)
>>> views = views_for("digits", digits.image_shape, 8)
>>> data = TrainingData(digits, split, views, labeled_batch=10, unlabeled_batch=20)
>>> trainer = Trainer(ConvNet(1, 10), data, base=FixMatch(0.8), method=Refiner(L2I()), steps=100)
>>> for _ in range(2):
...     trainer.train_step()
>>> sorted(trainer.step_averages.read())
['confident', 'imputed_error', 'loss', 'loss_labeled', 'loss_unlabeled', 'used_error']
"""

from fastmeta.training.batches import Batches, TrainingData
from fastmeta.training.build import build, load_images, resolve
from fastmeta.training.compare import CompareConfig, compare, grid
from fastmeta.training.config import (
    AugmentationConfig,
    AverageConfig,
    EvaluationConfig,
    MachineConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    SplitConfig,
    from_dict,
)
from fastmeta.training.ema import ExponentialMovingAverage
from fastmeta.training.evaluation import Evaluator
from fastmeta.training.processes import Processes
from fastmeta.training.train import ConfigMismatch, NotFinite, train
from fastmeta.training.trainer import Trainer

__all__ = [
    "AugmentationConfig",
    "AverageConfig",
    "Batches",
    "CompareConfig",
    "ConfigMismatch",
    "EvaluationConfig",
    "Evaluator",
    "ExponentialMovingAverage",
    "MachineConfig",
    "NotFinite",
    "OptimizerConfig",
    "Processes",
    "RunConfig",
    "ScheduleConfig",
    "SplitConfig",
    "Trainer",
    "TrainingData",
    "build",
    "compare",
    "from_dict",
    "grid",
    "load_images",
    "resolve",
    "train",
]
