"""Trainers: runs, comparisons of runs, and their reports."""

from fastmeta.training.compare import CompareConfig, compare, grid
from fastmeta.training.config import RunConfig
from fastmeta.training.ema import ExponentialMovingAverage
from fastmeta.training.run import Run
from fastmeta.training.train import ConfigMismatch, train

__all__ = [
    "CompareConfig",
    "ConfigMismatch",
    "ExponentialMovingAverage",
    "Run",
    "RunConfig",
    "compare",
    "grid",
    "train",
]
