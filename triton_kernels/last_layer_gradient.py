"""Gradient of the last layer, ``R^T h`` and ``sum_i R_i`` with ``R = w r``."""

from torch import Tensor

from fastmeta import checks
from fastmeta.ops import _last_layer as arguments
from fastmeta.triton_kernels import _last_layer
from fastmeta.triton_kernels._program import Program
from fastmeta.triton_kernels._row_functions import RESIDUAL


def plan(
    features: Tensor,
    logits: Tensor | None,
    head_weight: Tensor | None,
    head_bias: Tensor | None,
    targets: Tensor,
    weights: Tensor | None,
    loss: int,
    *,
    sums_apart: bool = False,
) -> Program:
    """See :func:`fastmeta.ops.last_layer_gradient`. ``[C, D]``, ``[C]``."""
    _, num_classes = arguments.check_outputs(features, arguments.joined(logits, head_weight, head_bias))
    checks.targets(targets, features, num_classes)
    arguments.check_weights(features, weights)
    tensors = {
        "features": features,
        "logits": logits,
        "head_weight": head_weight,
        "head_bias": head_bias,
        "targets": targets,
        "weights": weights,
    }
    call = _last_layer.call_of(RESIDUAL.value, loss, tensors)
    return _last_layer.plan(call, sums_apart=sums_apart)
