"""The inner and outer problem of one step: what directions and derivatives are computed from.

With ``m`` the mask, ``w`` the example weights, ``z`` the imputed labels and B the number of unlabeled examples::

    inner   C^U(theta) = (1/B) sum_i m_i w_i l(f_i, z_i)      (a sum in place of the mean where a class says so)
    outer   C^H(theta) = (1/B_h) sum_j l_h(f_j, y_j)

:class:`LastLayerProblem` is that problem where only the last layer moves, in closed form; :class:`WholeModelProblem`
has the same interface where the whole model moves, and knows ``how`` a derivative along a direction is taken. Over the
processes of a group the means are those of the joined batch.
"""

from typing import TypeAlias

from fastmeta.problem.base import (
    HOWS,
    Curvature,
    How,
    InnerLoss,
    Part,
    Reduction,
    check_how,
    full_precision,
)
from fastmeta.problem.direction import (
    AnyDirection,
    Dense,
    Direction,
    Factors,
    Trajectory,
    Vector,
    of_last_layer,
    single,
    steps_of,
)
from fastmeta.problem.last_layer import LastLayerProblem, Rows
from fastmeta.problem.targets import probabilities
from fastmeta.problem.whole_model import WholeModelProblem

Problem: TypeAlias = LastLayerProblem | WholeModelProblem

__all__ = [
    "HOWS",
    "AnyDirection",
    "Curvature",
    "Dense",
    "Direction",
    "Factors",
    "How",
    "InnerLoss",
    "LastLayerProblem",
    "Part",
    "Problem",
    "Reduction",
    "Rows",
    "Trajectory",
    "Vector",
    "WholeModelProblem",
    "check_how",
    "full_precision",
    "of_last_layer",
    "probabilities",
    "single",
    "steps_of",
]
