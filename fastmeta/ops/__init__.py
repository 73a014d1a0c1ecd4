"""The operators. Each file holds one: its reference in plain PyTorch, directly above the public function."""

from fastmeta.ops._workspace import free_workspace
from fastmeta.ops.alignment_direction import alignment_direction
from fastmeta.ops.feature_similarity import feature_similarity
from fastmeta.ops.finite_difference_labels import finite_difference_labels
from fastmeta.ops.hvp import hessian_vector_product
from fastmeta.ops.label_gradient import label_gradient
from fastmeta.ops.last_layer_gradient import last_layer_gradient
from fastmeta.ops.masked_adam import masked_adam_
from fastmeta.ops.per_example_dot import per_example_dot
from fastmeta.ops.perturbed import perturbed
from fastmeta.ops.solve_hessian import HessianSolution, NotConvergedWarning, SolverState, solve_hessian

__all__ = [
    "HessianSolution",
    "NotConvergedWarning",
    "SolverState",
    "alignment_direction",
    "feature_similarity",
    "finite_difference_labels",
    "free_workspace",
    "hessian_vector_product",
    "label_gradient",
    "last_layer_gradient",
    "masked_adam_",
    "per_example_dot",
    "perturbed",
    "solve_hessian",
]
