"""The cases, one file for each operator under the file name it has in ``fastmeta/ops``."""

from bench.case import Case
from bench.ops import (
    alignment_direction,
    feature_similarity,
    finite_difference_labels,
    hvp,
    label_gradient,
    last_layer_gradient,
    masked_adam,
    per_example_dot,
    perturbed,
    solve_hessian,
)

_MODULES = (
    per_example_dot,
    label_gradient,
    last_layer_gradient,
    hvp,
    solve_hessian,
    feature_similarity,
    finite_difference_labels,
    perturbed,
    alignment_direction,
    masked_adam,
)
OPERATORS: tuple[str, ...] = tuple(module.OPERATOR for module in _MODULES)
# The stem of each operator's file, here, in fastmeta/ops and in tests.
STEMS: dict[str, str] = {module.OPERATOR: module.__name__.rpartition(".")[2] for module in _MODULES}
CASES: list[Case] = [case for module in _MODULES for case in module.CASES]
