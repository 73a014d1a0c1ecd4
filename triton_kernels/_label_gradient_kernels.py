"""Kernels of the label gradient: whole rows, rows in two sweeps, and tiles of classes that make their products.

``z = h V^T + b`` is overwritten by the result wherever it has been written. ``f`` are logits, given or from a head, and
``e = exp(f - max f)``.
"""

import triton
import triton.language as tl

from fastmeta.triton_kernels._online_softmax import rise, shares_scale
from fastmeta.triton_kernels._products import columns, logits_and_tangent, times
from fastmeta.triton_kernels._rows import MSE_PROBS, label_tangent, padding


@triton.jit
def _logits(f, row, place, logits_ptr, head_bias_ptr, num_classes, logits_row, logits_column, head_bias_step,
            loss: tl.constexpr):  # fmt: skip
    """``f`` with the head's bias, or the logits given. ``[rows, classes]``."""
    inside = (place < num_classes)[None]
    if logits_ptr is not None:
        f_ptr = logits_ptr + row[:, None] * logits_row + place[None] * logits_column
        f = tl.load(f_ptr, inside, 0.0).to(tl.float32)
    if head_bias_ptr is not None:
        f += tl.load(head_bias_ptr + place * head_bias_step, place < num_classes, 0.0).to(tl.float32)[None]
    return tl.where(inside, f, padding(loss))


@triton.jit
def _tangent(z, place, bias_ptr, num_classes, bias_step):
    """``z`` with its bias; 0 beyond the classes. ``[rows, classes]``."""
    if bias_ptr is not None:
        z += tl.load(bias_ptr + place * bias_step, place < num_classes, 0.0).to(tl.float32)[None]
    return tl.where((place < num_classes)[None], z, 0.0)


@triton.jit(do_not_specialize=["first_row", "end_row", "logits_first"])
def whole_rows(
    features_ptr, logits_ptr, head_ptr, head_bias_ptr, direction_ptr, bias_ptr, out_ptr,
    first_row, end_row, logits_first, num_features, num_classes, scale,
    features_row, features_column, logits_row, logits_column, head_row, head_column, head_bias_step,
    direction_row, direction_column, bias_step,
    loss: tl.constexpr, block_rows: tl.constexpr, block_classes: tl.constexpr,
    block_features: tl.constexpr, even: tl.constexpr, precision: tl.constexpr,
    class_multiple: tl.constexpr, feature_multiple: tl.constexpr,
):  # fmt: skip
    """Rows first_row to end_row, all classes in the tile. Without a direction the product is in ``out [N, C]``.

    The logits begin at logits_first.
    """
    num_classes *= class_multiple
    num_features *= feature_multiple
    features_row = times(features_row, feature_multiple)
    head_row = times(head_row, feature_multiple)
    direction_row = times(direction_row, feature_multiple)
    logits_row = times(logits_row, class_multiple)
    line = first_row + tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)
    row = tl.minimum(line, end_row - 1)
    place = tl.arange(0, block_classes).to(tl.int64)
    result_ptr = out_ptr + row[:, None] * num_classes + place[None]
    if direction_ptr is None:
        z = tl.load(result_ptr, (place < num_classes)[None], 0.0).to(tl.float32)
        f = z
    else:
        f, z = logits_and_tangent(
            features_ptr, head_ptr, direction_ptr, row, tl.minimum(place, num_classes - 1), num_features,
            features_row, features_column, head_row, head_column, direction_row, direction_column,
            block_rows, block_classes, block_features, even, precision,
        )  # fmt: skip
    z = _tangent(z, place, bias_ptr, num_classes, bias_step)
    f = _logits(
        f, row - logits_first, place, logits_ptr, head_bias_ptr, num_classes, logits_row, logits_column,
        head_bias_step, loss,
    )  # fmt: skip
    result = scale * label_tangent(f, z, loss)
    inside = (line < end_row)[:, None] & (place < num_classes)[None]
    tl.store(result_ptr, result.to(out_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["first_row", "end_row", "logits_first"])
def two_sweeps(
    logits_ptr, head_bias_ptr, bias_ptr, out_ptr,
    first_row, end_row, logits_first, num_classes, scale,
    logits_row, logits_column, head_bias_step, bias_step,
    loss: tl.constexpr, block_classes: tl.constexpr, class_multiple: tl.constexpr,
):  # fmt: skip
    """One row: its sums, then ``out [N, C]``, which holds the product, tile by tile. For the losses with a softmax."""
    num_classes *= class_multiple
    logits_row = times(logits_row, class_multiple)
    line = first_row + tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    row = tl.minimum(line, end_row - 1)
    top = tl.full((1,), float("-inf"), tl.float32)
    e_sum = tl.zeros((1,), tl.float32)
    ez = tl.zeros((1,), tl.float32)
    for first in range(0, num_classes, block_classes):
        place = first + tl.arange(0, block_classes).to(tl.int64)
        inside = (place < num_classes)[None]
        z = tl.load(out_ptr + row[:, None] * num_classes + place[None], inside, 0.0).to(tl.float32)
        z = _tangent(z, place, bias_ptr, num_classes, bias_step)
        f = _logits(
            z, row - logits_first, place, logits_ptr, head_bias_ptr, num_classes, logits_row, logits_column,
            head_bias_step, loss,
        )  # fmt: skip
        top, reference, kept = rise(top, f)
        e = tl.exp(f - reference[:, None])
        e_sum = e_sum * kept + tl.sum(e, 1)
        ez = ez * kept + tl.sum(e * z, 1)
    mean = (ez / e_sum)[:, None]
    for first in range(0, num_classes, block_classes):
        place = first + tl.arange(0, block_classes).to(tl.int64)
        inside = (place < num_classes)[None]
        result_ptr = out_ptr + row[:, None] * num_classes + place[None]
        z = tl.load(result_ptr, inside, 0.0).to(tl.float32)
        result = _tangent(z, place, bias_ptr, num_classes, bias_step) - mean
        if loss == MSE_PROBS:
            f = _logits(
                z, row - logits_first, place, logits_ptr, head_bias_ptr, num_classes, logits_row, logits_column,
                head_bias_step, loss,
            )  # fmt: skip
            result *= 2.0 * tl.exp(f - top[:, None]) / e_sum[:, None]
        tl.store(result_ptr, (scale * result).to(out_ptr.dtype.element_ty), inside & (line < end_row)[:, None])


@triton.jit(do_not_specialize=["num_rows"])
def flash_sums(
    features_ptr, logits_ptr, head_ptr, head_bias_ptr, direction_ptr, bias_ptr, out_ptr, sums_ptr,
    num_rows, num_features, num_classes, tiles,
    features_row, features_column, logits_row, logits_column, head_row, head_column, head_bias_step,
    direction_row, direction_column, bias_step,
    loss: tl.constexpr, block_rows: tl.constexpr, block_classes: tl.constexpr, parts: tl.constexpr,
    block_features: tl.constexpr, even: tl.constexpr, precision: tl.constexpr,
    class_multiple: tl.constexpr, feature_multiple: tl.constexpr,
):  # fmt: skip
    """``z`` into ``out [N, C]`` and the sums ``[shares, 3, N]`` over ``tiles`` tiles of classes each."""
    num_classes *= class_multiple
    num_features *= feature_multiple
    features_row = times(features_row, feature_multiple)
    head_row = times(head_row, feature_multiple)
    direction_row = times(direction_row, feature_multiple)
    logits_row = times(logits_row, class_multiple)
    line = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)
    row = tl.minimum(line, num_rows - 1)
    row_inside = line < num_rows
    share = tl.program_id(1).to(tl.int64)
    top = tl.full((block_rows,), float("-inf"), tl.float32)
    e_sum = tl.zeros((block_rows,), tl.float32)
    ez = tl.zeros((block_rows,), tl.float32)
    for tile in range(tiles):
        first = (share * tiles + tile) * block_classes
        column = tl.minimum(first + tl.arange(0, block_classes), num_classes - 1)
        f_tile, z_tile = logits_and_tangent(
            features_ptr, head_ptr, direction_ptr, row, column, num_features,
            features_row, features_column, head_row, head_column, direction_row, direction_column,
            block_rows, block_classes, block_features, even, precision,
        )  # fmt: skip
        for part in tl.static_range(parts):
            place = first + part * (block_classes // parts) + tl.arange(0, block_classes // parts)
            z = _tangent(columns(z_tile, part, parts), place, bias_ptr, num_classes, bias_step)
            inside = row_inside[:, None] & (place < num_classes)[None]
            z_ptr = out_ptr + row[:, None] * num_classes + place[None]
            rounded = z.to(out_ptr.dtype.element_ty)
            tl.store(z_ptr, rounded, inside)
            z = rounded.to(tl.float32)  # as it is read back: the mean must cancel it where p is 1
            f = _logits(
                columns(f_tile, part, parts), row, place, logits_ptr, head_bias_ptr, num_classes, logits_row,
                logits_column, head_bias_step, loss,
            )  # fmt: skip
            top, reference, kept = rise(top, f)
            e = tl.exp(f - reference[:, None])
            e_sum = e_sum * kept + tl.sum(e, 1)
            ez = ez * kept + tl.sum(e * z, 1)
    sums_ptr += share * 3 * num_rows + row
    tl.store(sums_ptr, top, row_inside)
    tl.store(sums_ptr + num_rows, e_sum, row_inside)
    tl.store(sums_ptr + 2 * num_rows.to(tl.int64), ez, row_inside)


@triton.jit(do_not_specialize=["num_rows", "shares"])
def flash_finish(
    features_ptr, logits_ptr, head_ptr, head_bias_ptr, out_ptr, sums_ptr,
    num_rows, num_features, num_classes, shares, scale,
    features_row, features_column, logits_row, logits_column, head_row, head_column, head_bias_step,
    loss: tl.constexpr, block_shares: tl.constexpr, block_rows: tl.constexpr, block_classes: tl.constexpr,
    parts: tl.constexpr, block_features: tl.constexpr, even: tl.constexpr, precision: tl.constexpr,
    class_multiple: tl.constexpr, feature_multiple: tl.constexpr,
):  # fmt: skip
    """``out [N, C]``, which holds ``z``, from the rows' sums; logits or a head are needed for ``mse_probs`` only."""
    num_classes *= class_multiple
    num_features *= feature_multiple
    features_row = times(features_row, feature_multiple)
    head_row = times(head_row, feature_multiple)
    logits_row = times(logits_row, class_multiple)
    line = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)
    row = tl.minimum(line, num_rows - 1)
    row_inside = line < num_rows
    first = tl.program_id(1).to(tl.int64) * block_classes
    share = tl.arange(0, block_shares).to(tl.int64)
    there = (share < shares)[None]
    pointer = sums_ptr + row[:, None] + share[None] * 3 * num_rows
    tops = tl.load(pointer, there, float("-inf"))
    factor = shares_scale(tops)
    e_sum = tl.sum(tl.load(pointer + num_rows, there, 0.0) * factor, 1)
    ez = tl.sum(tl.load(pointer + 2 * num_rows.to(tl.int64), there, 0.0) * factor, 1)
    top = tl.max(tops, 1)
    mean = (ez / e_sum)[:, None]

    f_tile = tl.zeros((block_rows, block_classes), tl.float32)
    if loss == MSE_PROBS and head_ptr is not None:
        column = tl.minimum(first + tl.arange(0, block_classes), num_classes - 1)
        f_tile, _ = logits_and_tangent(
            features_ptr, head_ptr, None, row, column, num_features,
            features_row, features_column, head_row, head_column, 0, 0,
            block_rows, block_classes, block_features, even, precision,
        )  # fmt: skip
    for part in tl.static_range(parts):
        place = first + part * (block_classes // parts) + tl.arange(0, block_classes // parts)
        inside = row_inside[:, None] & (place < num_classes)[None]
        result_ptr = out_ptr + row[:, None] * num_classes + place[None]
        result = tl.load(result_ptr, inside, 0.0).to(tl.float32) - mean
        if loss == MSE_PROBS:
            f = _logits(
                columns(f_tile, part, parts), row, place, logits_ptr, head_bias_ptr, num_classes, logits_row,
                logits_column, head_bias_step, loss,
            )  # fmt: skip
            result *= 2.0 * tl.exp(f - top[:, None]) / e_sum[:, None]
        tl.store(result_ptr, (scale * result).to(out_ptr.dtype.element_ty), inside)
