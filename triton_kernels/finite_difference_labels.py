"""The label step of Meta-Gradient: both softmaxes, the step and the projection in one kernel that reads a row once."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmeta import checks
from fastmeta.triton_kernels import _arguments
from fastmeta.triton_kernels._launch import Launch, Plans, layout, on_device
from fastmeta.triton_kernels._rows import softmax


@triton.jit(do_not_specialize=["num_rows"])
def _whole_rows(
    plus_ptr, minus_ptr, labels_ptr, epsilon_ptr, out_ptr,
    num_rows, num_classes, step,
    plus_row, plus_column, minus_row, minus_column, labels_row, labels_column,
    project: tl.constexpr, block_rows: tl.constexpr, block_classes: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * block_rows + tl.arange(0, block_rows)).to(tl.int64)[:, None]
    column = tl.arange(0, block_classes).to(tl.int64)[None]
    inside = (row < num_rows) & (column < num_classes)
    minus_infinity = float("-inf")
    plus = tl.load(plus_ptr + row * plus_row + column * plus_column, inside, minus_infinity).to(tl.float32)
    minus = tl.load(minus_ptr + row * minus_row + column * minus_column, inside, minus_infinity).to(tl.float32)
    labels = tl.load(labels_ptr + row * labels_row + column * labels_column, inside, 0.0).to(tl.float32)
    epsilon = tl.load(epsilon_ptr).to(tl.float32)
    moved = labels - step * (softmax(plus) - softmax(minus)) / epsilon
    if project:
        # Not tl.maximum: it would drop a NaN.
        moved = tl.where(inside, tl.where(moved < 0, 0.0, moved), 0.0)
        total = tl.sum(moved, 1)[:, None]
        moved = tl.where(total == 0, 1.0 / num_classes, moved / tl.where(total == 0, 1.0, total))
    tl.store(out_ptr + row * num_classes + column, moved.to(out_ptr.dtype.element_ty), inside)


_PLANS: Plans[Launch | None] = Plans()


def _plan(logits_plus: Tensor, logits_minus: Tensor, labels: Tensor, epsilon: Tensor, project: bool) -> Launch | None:
    n, c = checks.matrix(logits_plus, "logits_plus", "[N, C]").shape
    _arguments.supported(logits_plus)
    checks.shaped(logits_minus, "logits_minus", "[N, C]", (n, c))
    checks.shaped(labels, "labels", "[N, C]", (n, c))
    checks.like(logits_plus, "logits_plus", logits_minus=logits_minus, labels=labels)
    if checks.floating(epsilon, "epsilon").numel() != 1 or epsilon.device != logits_plus.device:
        raise ValueError(f"epsilon must be one element on {logits_plus.device}, got {list(epsilon.shape)}")
    if n == 0 or c == 0:
        return None
    block_classes = max(triton.next_power_of_2(c), 16)
    block_rows = max(1, 1024 // block_classes)
    constants = {"project": project, "block_rows": block_rows, "block_classes": block_classes}
    return Launch(
        _whole_rows, (triton.cdiv(n, block_rows),), constants, num_warps=min(max(block_classes // 256, 4), 16)
    )


@on_device
def finite_difference_labels(
    logits_plus: Tensor, logits_minus: Tensor, labels: Tensor, epsilon: Tensor, step: float, project: bool
) -> Tensor:
    """See :func:`fastmeta.ops.finite_difference_labels`. ``[N, C]``."""
    key = (logits_plus.device, project, *layout(logits_plus, logits_minus, labels, epsilon))
    if key in _PLANS:
        launch = _PLANS[key]
    else:
        launch = _PLANS.keep(key, _plan(logits_plus, logits_minus, labels, epsilon, project))
    if not math.isfinite(step):
        raise ValueError(f"step must be finite, got {step}")
    out = torch.empty(logits_plus.shape, dtype=logits_plus.dtype, device=logits_plus.device)
    if launch is not None:
        strides = (*logits_plus.stride(), *logits_minus.stride(), *labels.stride())
        launch(logits_plus, logits_minus, labels, epsilon, out, *logits_plus.shape, step, *strides)
    return out
