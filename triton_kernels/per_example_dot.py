"""``<r_i, z_i>`` with ``z = h V^T + b``: one sweep over the classes of a row, whatever its length."""

from torch import Tensor

from fastmeta import checks
from fastmeta.ops import _last_layer as arguments
from fastmeta.triton_kernels import _last_layer
from fastmeta.triton_kernels._program import Program
from fastmeta.triton_kernels._row_functions import DOT


def plan(
    features: Tensor,
    logits: Tensor | None,
    head_weight: Tensor | None,
    head_bias: Tensor | None,
    targets: Tensor,
    direction_weight: Tensor,
    direction_bias: Tensor | None,
    loss: int,
) -> Program:
    """See :func:`fastmeta.ops.per_example_dot`. ``[N]``."""
    _, num_classes = arguments.check_outputs(features, arguments.joined(logits, head_weight, head_bias))
    checks.targets(targets, features, num_classes)
    arguments.check_direction(features, num_classes, direction_weight, direction_bias)
    tensors = {
        "features": features,
        "logits": logits,
        "head_weight": head_weight,
        "head_bias": head_bias,
        "targets": targets,
        "direction_weight": direction_weight,
        "direction_bias": direction_bias,
    }
    return _last_layer.plan(_last_layer.call_of(DOT.value, loss, tensors))
