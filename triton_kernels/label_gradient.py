"""``scale t(z_i)`` with ``z = h V^T + b``, in place of ``z`` where that has been written.

Of a loss whose label tangent is z times a number, whatever the logits, it is a product and nothing else.
"""

import math

from torch import Tensor

from fastmeta import checks
from fastmeta.ops import _last_layer as arguments
from fastmeta.triton_kernels import _last_layer
from fastmeta.triton_kernels._program import Program
from fastmeta.triton_kernels._row_functions import LABEL_TANGENT, reads_targets


def plan(
    features: Tensor,
    logits: Tensor | None,
    head_weight: Tensor | None,
    head_bias: Tensor | None,
    targets: Tensor | None,
    direction_weight: Tensor,
    direction_bias: Tensor | None,
    loss: int,
    scale: float,
) -> Program:
    """See :func:`fastmeta.ops.label_gradient`. ``[N, C]``; the scale is the call's number."""
    _, num_classes = arguments.check_outputs(features, arguments.joined(logits, head_weight, head_bias))
    arguments.check_direction(features, num_classes, direction_weight, direction_bias)
    if reads_targets(loss, LABEL_TANGENT.value):
        checks.targets(targets, features, num_classes)
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    tensors = {
        "features": features,
        "logits": logits,
        "head_weight": head_weight,
        "head_bias": head_bias,
        "targets": targets,
        "direction_weight": direction_weight,
        "direction_bias": direction_bias,
    }
    call = _last_layer.call_of(LABEL_TANGENT.value, loss, tensors)
    return _last_layer.plan(call)
