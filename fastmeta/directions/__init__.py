"""Directions: along what do the parameters move?

A rule maps a problem of :mod:`fastmeta.problem`, at the last layer or of the whole model, to a direction. Rules that
refine another one take it as ``of``, so that they nest: ``LookAhead(UnitLength(HoldoutGradient()), rate=0.1)``.
"""

from fastmeta.directions.holdout_gradient import HoldoutGradient
from fastmeta.directions.in_layers import InLayers
from fastmeta.directions.inverse_hessian import InverseHessian, Solver
from fastmeta.directions.look_ahead import LookAhead
from fastmeta.directions.normalized_gap import NormalizedGap
from fastmeta.directions.rule import DirectionRule
from fastmeta.directions.unit_length import UnitLength

__all__ = [
    "DirectionRule",
    "HoldoutGradient",
    "InLayers",
    "InverseHessian",
    "LookAhead",
    "NormalizedGap",
    "Solver",
    "UnitLength",
]
