"""Gradient of the last layer, ``R^T h`` and ``sum_i R_i`` with ``R = w r``."""

from torch import Tensor

from fastmeta import checks
from fastmeta.triton_kernels import _arguments, _last_layer
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
    _arguments.loss(loss)
    num_classes = _arguments.outputs(features, logits, head_weight, head_bias)[2]
    checks.targets(targets, features, num_classes)
    _arguments.weights(features, weights)
    tensors = {
        "features": features,
        "logits": logits,
        "head_weight": head_weight,
        "head_bias": head_bias,
        "targets": targets,
        "weights": weights,
    }
    problem = _last_layer.Problem(RESIDUAL.value, loss, tensors, _arguments.precision(features))
    return _last_layer.plan(problem, sums_apart=sums_apart)
