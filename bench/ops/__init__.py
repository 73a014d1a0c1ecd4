"""The cases: one file for each operator, under its name in ``fastmeta/ops``."""

from bench.case import Case
from bench.choices import OPERATORS
from bench.ops import (
    alignment_direction,
    feature_similarity,
    finite_difference_labels,
    hvp,
    label_gradient,
    last_layer,
    last_layer_gradient,
    masked_adam,
    per_example_dot,
    perturbed,
    solve_hessian,
)

_MODULES = (
    *(solve_hessian, feature_similarity, finite_difference_labels),
    *(perturbed, alignment_direction, masked_adam),
)
LAST_LAYER = (
    *(module.ON_LOGITS for module in (per_example_dot, label_gradient, last_layer_gradient, hvp)),
    *(module.FROM_HEAD for module in (per_example_dot, label_gradient, last_layer_gradient)),
)


def cases(device: str) -> list[Case]:
    """Those of a device, operator by operator."""
    found = [case for operator in LAST_LAYER for case in last_layer.cases(operator, device)]
    found += [case for module in _MODULES for case in module.cases(device)]
    return sorted(found, key=lambda case: OPERATORS.index(case.operator))
