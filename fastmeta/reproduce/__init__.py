"""Experiments of the papers, measured here: ``fastmeta reproduce NAME``."""

from fastmeta.reproduce.experiment import Experiment
from fastmeta.reproduce.lga_linear import LGA_LINEAR

EXPERIMENTS: dict[str, Experiment] = {experiment.name: experiment for experiment in (LGA_LINEAR,)}

__all__ = ["EXPERIMENTS", "Experiment"]
