"""Experiments of the papers, measured here: ``fastmeta reproduce NAME``."""

from fastmeta.reproduce.experiment import Experiment
from fastmeta.reproduce.fd_radius import FD_RADIUS
from fastmeta.reproduce.field import FIELD
from fastmeta.reproduce.l2i_ablations import L2I_EXACT, L2I_HOLDOUT
from fastmeta.reproduce.lga_linear import LGA_LINEAR
from fastmeta.reproduce.lga_spheres import LGA_SPHERES
from fastmeta.reproduce.meta_ablation import META_ABLATION
from fastmeta.reproduce.weights_in_the_plane import WEIGHTS_CIRCLES, WEIGHTS_LINEAR, WEIGHTS_MOONS
from fastmeta.reproduce.weights_runtime import WEIGHTS_RUNTIME

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        WEIGHTS_LINEAR,
        WEIGHTS_CIRCLES,
        WEIGHTS_MOONS,
        WEIGHTS_RUNTIME,
        LGA_LINEAR,
        LGA_SPHERES,
        L2I_EXACT,
        L2I_HOLDOUT,
        META_ABLATION,
        FD_RADIUS,
        FIELD,
    )
}

__all__ = ["EXPERIMENTS", "Experiment"]
