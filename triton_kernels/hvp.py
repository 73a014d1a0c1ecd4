"""Hessian-vector product of the last layer, ``R^T h + damping V`` and ``sum_i R_i + damping b`` with ``R = w c(z)``."""

from torch import Tensor

from fastmeta import checks
from fastmeta.ops import _last_layer as arguments
from fastmeta.triton_kernels import _last_layer
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
    _, num_classes = arguments.check_outputs(features, logits)
    arguments.check_direction(features, num_classes, direction_weight, direction_bias)
    arguments.check_weights(features, weights)
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
    call = _last_layer.call_of(CURVATURE.value, loss, tensors, damped=damping != 0)
    return _last_layer.plan(call, sums_apart=sums_apart)
