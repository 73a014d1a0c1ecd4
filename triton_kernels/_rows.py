"""One kernel over rows in memory, for every operator: what a loss makes of logits, targets and tangents.

A row is read in tiles of groups of neighbouring entries, 16 bytes each. A thread owns whole groups and keeps each
group's running sums, so that the loop over a long row has neither a barrier nor a shuffle; the sums of all groups are
combined once, after the loop. A result with an entry for each class takes a second sweep, which finds the row in the L2
cache; rows of one tile stay in registers.
"""

import triton
import triton.language as tl

from fastmeta.triton_kernels._row_functions import (
    DOT,
    LABEL_TANGENT,
    added,
    dot_of_sums,
    entries,
    finite,
    has_softmax,
    hit,
    joined,
    padding,
    reads_targets,
)


@triton.jit
def times(stride, multiple: tl.constexpr):
    """Undoes the division by :func:`._program.multiple`, which says why."""
    if multiple == 1:
        return stride
    else:
        return stride * tl.full((), multiple, tl.int64)


@triton.jit
def load_rows(pointer, row, place, row_stride, column_stride, inside, fill):
    """``[rows, groups, entries]`` in float32."""
    at = pointer + row[:, None, None] * row_stride + place[None] * column_stride
    return tl.load(at, inside, fill).to(tl.float32)


@triton.jit
def _operands(
    f_ptr, z_ptr, y_ptr, row, row_inside, place, label, num_classes,
    f_row, f_column, z_row, y_row, y_column,
    loss: tl.constexpr, function: tl.constexpr, classes: tl.constexpr,
):  # fmt: skip
    """Logits, targets and tangents of a tile, whichever the row function reads; ``place [groups, entries]``."""
    inside = row_inside[:, None, None] & (place < num_classes)[None]
    f = tl.zeros(inside.shape, tl.float32)
    z = f
    y = f
    if f_ptr is not None:
        f = load_rows(f_ptr, row, place, f_row, f_column, inside, padding(loss))
    if z_ptr is not None:
        z = load_rows(z_ptr, row, place, z_row, 1, inside, 0.0)
    if reads_targets(loss, function):
        if classes:
            here = label.to(tl.int32)[:, None, None] == place.to(tl.int32)[None]
            y = tl.where(inside, tl.where(here, 1.0, 0.0) * hit(label, num_classes)[:, None, None], 0.0)
        else:
            # With a select between load and sum: a pass of Triton 3.6 fails on two sums of loads in one loop.
            y = tl.where(inside, load_rows(y_ptr, row, place, y_row, y_column, inside, 0.0), 0.0)
    return f, y, z


@triton.jit(do_not_specialize=["num_rows"])
def rows(
    f_ptr, z_ptr, y_ptr, weights_ptr, out_ptr, ones_ptr,
    num_rows, num_classes, scale,
    f_row, f_column, z_row, y_row, y_column, weights_step, out_row,
    loss: tl.constexpr, function: tl.constexpr, classes: tl.constexpr, multiple: tl.constexpr,
    block_rows: tl.constexpr, block_classes: tl.constexpr, group: tl.constexpr, single: tl.constexpr,
):  # fmt: skip
    """Logits ``f [N, C]``, tangents ``z [N, C]``, targets ``y [N, C]`` or classes ``[N]``; ``out [N]`` or ``[N, C]``.

    ``out`` may be ``f`` or ``z``. ``scale`` is the label gradient's factor. The residual and the curvature have weights
    ``[N]``, and ones ``[N]``, which are written here: R's columns are summed by a product with them.
    """
    num_classes = times(num_classes, multiple)
    f_row = times(f_row, multiple)
    z_row = times(z_row, multiple)
    if not classes:
        y_row = times(y_row, multiple)
    if function != DOT:
        out_row = times(out_row, multiple)
    line = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)
    row_inside = line < num_rows
    row = tl.minimum(line, num_rows - 1)
    groups: tl.constexpr = block_classes // group
    lane = (tl.arange(0, groups)[:, None] * group + tl.arange(0, group)[None]).to(tl.int64)
    label = row
    if classes:
        label = tl.load(y_ptr + row * y_row)

    top = tl.full((block_rows, groups), float("-inf"), tl.float32)
    e_sum = tl.zeros((block_rows, groups), tl.float32)
    y_sum, yz, ez, ee, eez = e_sum, e_sum, e_sum, e_sum, e_sum
    if single:
        f, y, z = _operands(
            f_ptr, z_ptr, y_ptr, row, row_inside, lane, label, num_classes,
            f_row, f_column, z_row, y_row, y_column, loss, function, classes,
        )  # fmt: skip
        top, e_sum, y_sum, yz, ez, ee, eez = added(
            top, e_sum, y_sum, yz, ez, ee, eez, f, y, z, loss, function
        )  # fmt: skip
    elif has_softmax(loss) or function == DOT:
        for first in range(0, num_classes, block_classes):
            f, y, z = _operands(
                f_ptr, z_ptr, y_ptr, row, row_inside, first + lane, label, num_classes,
                f_row, f_column, z_row, y_row, y_column, loss, function, classes,
            )  # fmt: skip
            top, e_sum, y_sum, yz, ez, ee, eez = added(
                top, e_sum, y_sum, yz, ez, ee, eez, f, y, z, loss, function
            )  # fmt: skip
    top, e_sum, y_sum, yz, ez, ee, eez = joined(top, e_sum, y_sum, yz, ez, ee, eez, loss, function)

    if function == DOT:
        result = dot_of_sums(e_sum, y_sum, yz, ez, ee, eez, loss)
        tl.store(out_ptr + row, result.to(out_ptr.dtype.element_ty), row_inside)
    else:
        factor = scale
        if function != LABEL_TANGENT:
            factor = tl.full((block_rows,), 1.0, tl.float32)
            if weights_ptr is not None:
                factor = tl.load(weights_ptr + row * weights_step).to(tl.float32)
            factor = factor[:, None, None]
            if ones_ptr is not None:
                one = tl.full((block_rows,), 1.0, tl.float32)
                tl.store(ones_ptr + row, one.to(ones_ptr.dtype.element_ty), row_inside)
        if has_softmax(loss):
            top = finite(top)[:, None, None]
            e_sum = e_sum[:, None, None]
            ez = ez[:, None, None]
            y_sum = y_sum[:, None, None]
            ee = ee[:, None, None]
            eez = eez[:, None, None]
        if single:
            r = factor * entries(f, y, z, top, e_sum, y_sum, ez, ee, eez, loss, function)
            inside = row_inside[:, None, None] & (lane < num_classes)[None]
            at = out_ptr + row[:, None, None] * out_row + lane[None]
            tl.store(at, r.to(out_ptr.dtype.element_ty), inside)
        else:
            for first in range(0, num_classes, block_classes):
                place = first + lane
                f, y, z = _operands(
                    f_ptr, z_ptr, y_ptr, row, row_inside, place, label, num_classes,
                    f_row, f_column, z_row, y_row, y_column, loss, function, classes,
                )  # fmt: skip
                r = factor * entries(f, y, z, top, e_sum, y_sum, ez, ee, eez, loss, function)
                inside = row_inside[:, None, None] & (place < num_classes)[None]
                at = out_ptr + row[:, None, None] * out_row + place[None]
                tl.store(at, r.to(out_ptr.dtype.element_ty), inside)
