"""The label step of Meta-Gradient: both softmaxes, the step and the projection in one kernel.

A row that fits a tile is read once. Longer ones are swept: once for both softmaxes, once for the sum of what is left
after the clip, and once to write. As in :mod:`._rows`, threads meet only between the sweeps.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from fastmeta import checks
from fastmeta.triton_kernels._last_layer import row_tile
from fastmeta.triton_kernels._program import Buffer, Number, Program, Ref, check_dtype, launch, multiple
from fastmeta.triton_kernels._row_functions import finite
from fastmeta.triton_kernels._rows import load_rows, times


@triton.jit
def _risen(top, total, f):
    """Running maximum and sum of ``exp(f - top)`` of every group; NaN and +inf end in the sum."""
    higher = tl.maximum(top, tl.max(f, 2))
    origin = finite(higher)
    return higher, total * tl.exp(top - origin) + tl.sum(tl.exp(f - origin[:, :, None]), 2)


@triton.jit
def _over_groups(top, total):
    """Maximum and sum of a row from those of its groups. ``[rows, 1, 1]``."""
    highest = tl.max(top, 1)
    total = tl.sum(total * tl.exp(top - finite(highest)[:, None]), 1)
    return finite(highest)[:, None, None], total[:, None, None]


@triton.jit
def _moved(
    plus, minus, labels, plus_top, plus_sum, minus_top, minus_sum, epsilon, step, inside, project: tl.constexpr
):  # fmt: skip
    """The label after its step from both predictions, and clipped if it is projected."""
    p = tl.exp(plus - plus_top) / plus_sum
    q = tl.exp(minus - minus_top) / minus_sum
    moved = labels - step * (p - q) / epsilon
    if project:
        # Not tl.maximum: it would drop a NaN.
        moved = tl.where(inside, tl.where(moved < 0, 0.0, moved), 0.0)
    return moved


@triton.jit(do_not_specialize=["num_rows"])
def label_step(
    plus_ptr, minus_ptr, labels_ptr, epsilon_ptr, out_ptr,
    num_rows, num_classes, step,
    plus_row, plus_column, minus_row, minus_column, labels_row, labels_column,
    project: tl.constexpr, multiple: tl.constexpr,
    block_rows: tl.constexpr, block_classes: tl.constexpr, group: tl.constexpr, single: tl.constexpr,
):  # fmt: skip
    """``[N, C]`` each; ``epsilon`` is one number in memory."""
    num_classes = times(num_classes, multiple)
    plus_row = times(plus_row, multiple)
    minus_row = times(minus_row, multiple)
    labels_row = times(labels_row, multiple)
    line = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)
    row_inside = line < num_rows
    row = tl.minimum(line, num_rows - 1)
    groups: tl.constexpr = block_classes // group
    lane = (tl.arange(0, groups)[:, None] * group + tl.arange(0, group)[None]).to(tl.int64)
    minus_infinity: tl.constexpr = float("-inf")
    epsilon = tl.load(epsilon_ptr).to(tl.float32)
    plus_top = tl.full((block_rows, groups), minus_infinity, tl.float32)
    minus_top = plus_top
    plus_sum = tl.zeros((block_rows, groups), tl.float32)
    minus_sum = plus_sum
    if single:
        inside = row_inside[:, None, None] & (lane < num_classes)[None]
        plus = load_rows(plus_ptr, row, lane, plus_row, plus_column, inside, minus_infinity)
        minus = load_rows(minus_ptr, row, lane, minus_row, minus_column, inside, minus_infinity)
        labels = load_rows(labels_ptr, row, lane, labels_row, labels_column, inside, 0.0)
        plus_top, plus_sum = _risen(plus_top, plus_sum, plus)
        minus_top, minus_sum = _risen(minus_top, minus_sum, minus)
        plus_top, plus_sum = _over_groups(plus_top, plus_sum)
        minus_top, minus_sum = _over_groups(minus_top, minus_sum)
        moved = _moved(
            plus, minus, labels, plus_top, plus_sum, minus_top, minus_sum, epsilon, step, inside, project
        )  # fmt: skip
        if project:
            total = tl.sum(tl.sum(moved, 2), 1)[:, None, None]
            moved = tl.where(total == 0, 1.0 / num_classes, moved / tl.where(total == 0, 1.0, total))
        tl.store(out_ptr + row[:, None, None] * num_classes + lane[None], moved.to(out_ptr.dtype.element_ty), inside)
    else:
        for first in range(0, num_classes, block_classes):
            place = first + lane
            inside = row_inside[:, None, None] & (place < num_classes)[None]
            plus = load_rows(plus_ptr, row, place, plus_row, plus_column, inside, minus_infinity)
            minus = load_rows(minus_ptr, row, place, minus_row, minus_column, inside, minus_infinity)
            plus_top, plus_sum = _risen(plus_top, plus_sum, plus)
            minus_top, minus_sum = _risen(minus_top, minus_sum, minus)
        plus_top, plus_sum = _over_groups(plus_top, plus_sum)
        minus_top, minus_sum = _over_groups(minus_top, minus_sum)
        total = tl.full((block_rows, 1, 1), 1.0, tl.float32)
        if project:
            totals = tl.zeros((block_rows, groups), tl.float32)
            for first in range(0, num_classes, block_classes):
                place = first + lane
                inside = row_inside[:, None, None] & (place < num_classes)[None]
                plus = load_rows(plus_ptr, row, place, plus_row, plus_column, inside, minus_infinity)
                minus = load_rows(minus_ptr, row, place, minus_row, minus_column, inside, minus_infinity)
                labels = load_rows(labels_ptr, row, place, labels_row, labels_column, inside, 0.0)
                moved = _moved(
                    plus, minus, labels, plus_top, plus_sum, minus_top, minus_sum, epsilon, step, inside, project
                )  # fmt: skip
                totals += tl.sum(moved, 2)
            total = tl.sum(totals, 1)[:, None, None]
        for first in range(0, num_classes, block_classes):
            place = first + lane
            inside = row_inside[:, None, None] & (place < num_classes)[None]
            plus = load_rows(plus_ptr, row, place, plus_row, plus_column, inside, minus_infinity)
            minus = load_rows(minus_ptr, row, place, minus_row, minus_column, inside, minus_infinity)
            labels = load_rows(labels_ptr, row, place, labels_row, labels_column, inside, 0.0)
            moved = _moved(
                plus, minus, labels, plus_top, plus_sum, minus_top, minus_sum, epsilon, step, inside, project
            )  # fmt: skip
            if project:
                moved = tl.where(total == 0, 1.0 / num_classes, moved / tl.where(total == 0, 1.0, total))
            at = out_ptr + row[:, None, None] * num_classes + place[None]
            tl.store(at, moved.to(out_ptr.dtype.element_ty), inside)


def plan(
    logits_plus: Tensor, logits_minus: Tensor, labels: Tensor, epsilon: Tensor, step: float, project: bool
) -> Program:
    """See :func:`fastmeta.ops.finite_difference_labels`. ``[N, C]``; the step is the call's number."""
    n, c = checks.matrix(logits_plus, "logits_plus", "[N, C]").shape
    check_dtype(logits_plus)
    checks.shaped(logits_minus, "logits_minus", "[N, C]", (n, c))
    checks.shaped(labels, "labels", "[N, C]", (n, c))
    checks.like(logits_plus, "logits_plus", logits_minus=logits_minus, labels=labels)
    if checks.floating(epsilon, "epsilon").numel() != 1 or epsilon.device != logits_plus.device:
        raise ValueError(f"epsilon must be one element on {logits_plus.device}, got {list(epsilon.shape)}")
    if not math.isfinite(step):
        raise ValueError(f"step must be finite, got {step}")
    out = Buffer((n, c), logits_plus.dtype)
    if n == 0 or c == 0:
        return Program((out,), (), ())
    tile = row_tile(c, logits_plus.dtype)
    by = multiple(c, *(rows.stride(0) for rows in (logits_plus, logits_minus, labels)))
    strides = [size for rows in (logits_plus, logits_minus, labels) for size in (rows.stride(0) // by, rows.stride(1))]
    constants = {
        "project": project,
        "multiple": by,
        **tile.constants(c),
    }
    tensors = (*(Ref("input", index) for index in range(4)), Ref("output", 0))
    arguments = (*tensors, n, c // by, Number(0), *strides)
    step_of_rows = launch(label_step, (triton.cdiv(n, tile.rows),), arguments, constants, num_warps=tile.warps)
    return Program((out,), (), (step_of_rows,))
