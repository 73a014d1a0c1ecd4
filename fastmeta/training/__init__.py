"""Trainers: the loop, runs on disk, comparisons of runs, and their reports."""

from fastmeta.training.batches import Batches, TrainingData
from fastmeta.training.build import build, load_images, resolve
from fastmeta.training.compare import CompareConfig, compare, grid
from fastmeta.training.config import (
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
