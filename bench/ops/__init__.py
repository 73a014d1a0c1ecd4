"""The cases: one file for the four last-layer operators, one for each other under its name in ``fastmeta/ops``."""

from bench.case import Case
from bench.choices import OPERATORS
from bench.ops import (
    alignment_direction,
    feature_similarity,
    finite_difference_labels,
    last_layer,
    masked_adam,
    perturbed,
    solve_hessian,
)

_MODULES = (
    *(last_layer, solve_hessian, feature_similarity, finite_difference_labels),
    *(perturbed, alignment_direction, masked_adam),
)


def cases(device: str) -> list[Case]:
    """Those of a device, operator by operator."""
    found = [case for module in _MODULES for case in module.cases(device)]
    return sorted(found, key=lambda case: OPERATORS.index(case.operator))
