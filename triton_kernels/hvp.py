"""Hessian-vector product of the last layer, ``R^T h + damping V`` and ``sum_i R_i + damping b`` with ``R = w c(z)``."""

from torch import Tensor

from fastmeta import checks
from fastmeta.triton_kernels import _arguments, _last_layer
from fastmeta.triton_kernels._program import Program
from fastmeta.triton_kernels._row_functions import CURVATURE, reads_targets


def plan(
    features: Tensor,
    logits: Tensor,
    targets: Tensor | None,
    direction_weight: Tensor,
    direction_bias: Tensor | None,
    weights: Tensor | None,
    loss: int,
    damping: float,
    *,
    sums_apart: bool = False,
) -> Program:
    """See :func:`fastmeta.ops.hessian_vector_product`. ``[C, D]``, and ``[C]`` or ``[0]``; damping is the number."""
    _arguments.loss(loss)
    num_classes = _arguments.outputs(features, logits, None, None)[2]
    _arguments.direction(features, num_classes, direction_weight, direction_bias)
    _arguments.weights(features, weights)
    if reads_targets(loss, CURVATURE.value):
        checks.targets(targets, features, num_classes)
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping must be finite and >= 0, got {damping}")
    tensors = {
        "features": features,
        "logits": logits,
        "targets": targets,
        "direction_weight": direction_weight,
        "direction_bias": direction_bias,
        "weights": weights,
    }
    precision = _arguments.precision(features)
    problem = _last_layer.Problem(CURVATURE.value, loss, tensors, precision, damped=damping != 0)
    return _last_layer.plan(problem, sums_apart=sums_apart)
