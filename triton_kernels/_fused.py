"""One launch for a block of rows and all their classes: the products ``h W^T`` and ``h V^T``, then the row function.

For small heads, where one more launch costs as much as the arithmetic. Every program reads all of W and V.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastmeta.triton_kernels import _rule
from fastmeta.triton_kernels._row_functions import (
    DOT,
    LABEL_TANGENT,
    added,
    dot_of_sums,
    entries,
    finite,
    has_softmax,
    hit,
    padding,
    reads_targets,
)
from fastmeta.triton_kernels._rows import times


class Tile(NamedTuple):
    """Rows, classes and features of one step of the products, and the program that makes it."""

    rows: int
    classes: int
    features: int
    warps: int
    stages: int


# By bytes of an entry: 16-bit products, and float32 ones by three TF32 products or one. Measured on an H200.
TILES = {
    2: (Tile(16, 16, 128, 4, 3), Tile(16, 32, 128, 4, 3), Tile(16, 64, 64, 4, 3), Tile(16, 128, 64, 8, 3)),
    4: (Tile(16, 16, 64, 4, 3), Tile(16, 32, 64, 4, 3), Tile(16, 64, 64, 4, 3), Tile(16, 128, 32, 8, 3)),
}


@triton.jit
def products(
    features_ptr, head_ptr, direction_ptr,  # [N, D]; [C, D] or None each
    row, column,  # [rows], [classes]: int64, within the tensors
    num_features,
    features_row, features_column, head_row, head_column, direction_row, direction_column,
    block_features: tl.constexpr, even: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """``h W^T`` and ``h V^T`` of a tile from one read of ``h``; 0 where W or V is None. ``[rows, classes]`` each."""
    depth = tl.arange(0, block_features).to(tl.int64)
    further = tl.full((), block_features, tl.int64)  # int64: a stride times this may exceed 32 bits
    h_ptr = features_ptr + row[:, None] * features_row + depth[None] * features_column
    if head_ptr is not None:
        w_ptr = head_ptr + column[:, None] * head_row + depth[None] * head_column
    if direction_ptr is not None:
        v_ptr = direction_ptr + column[:, None] * direction_row + depth[None] * direction_column
    f = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    z = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    for start in range(0, num_features, block_features):
        inside = depth[None] < num_features - start
        h = tl.load(h_ptr) if even else tl.load(h_ptr, inside, 0.0)
        h_ptr += further * features_column
        if head_ptr is not None:
            w = tl.load(w_ptr) if even else tl.load(w_ptr, inside, 0.0)
            w_ptr += further * head_column
            f = tl.dot(h, tl.trans(w), f, input_precision=precision)
        if direction_ptr is not None:
            v = tl.load(v_ptr) if even else tl.load(v_ptr, inside, 0.0)
            v_ptr += further * direction_column
            z = tl.dot(h, tl.trans(v), z, input_precision=precision)
    return f, z


@triton.jit
def with_bias(x, bias_ptr, place, num_classes, step):
    """A product and its bias."""
    if bias_ptr is not None:
        x += tl.load(bias_ptr + place * step, place < num_classes, 0.0).to(tl.float32)[None]
    return x


@triton.jit
def targets_of(
    y_ptr, row, row_inside, place, num_classes, y_row, y_column, classes: tl.constexpr
):  # fmt: skip
    """Targets ``[rows, classes]`` in float32, 0 beyond the classes."""
    inside = row_inside[:, None] & (place < num_classes)[None]
    if classes:
        label = tl.load(y_ptr + row * y_row)
        here = label.to(tl.int32)[:, None] == place.to(tl.int32)[None]
        return tl.where(inside, tl.where(here, 1.0, 0.0) * hit(label, num_classes)[:, None], 0.0)
    else:
        y = tl.load(y_ptr + row[:, None] * y_row + place[None] * y_column, inside, 0.0).to(tl.float32)
        # With a select between load and sum: a pass of Triton 3.6 fails on two sums of loads in one loop.
        return tl.where(inside, y, 0.0)


@triton.jit(do_not_specialize=["num_rows"])
def fused(
    features_ptr, f_ptr, head_ptr, head_bias_ptr, y_ptr, weights_ptr, direction_ptr, direction_bias_ptr,
    out_ptr, ones_ptr,
    num_rows, num_features, num_classes, scale,
    features_row, features_column, f_row, f_column, head_row, head_column, head_bias_step, y_row, y_column,
    weights_step, direction_row, direction_column, direction_bias_step, out_row,
    loss: tl.constexpr, function: tl.constexpr, classes: tl.constexpr, multiple: tl.constexpr,
    feature_multiple: tl.constexpr, even: tl.constexpr, precision: tl.constexpr,
    block_rows: tl.constexpr, block_classes: tl.constexpr, block_features: tl.constexpr,
):  # fmt: skip
    """As :func:`._rows.rows`, with logits of a head ``[C, D]``, ``[C]`` or given, and tangents of a direction."""
    num_classes = times(num_classes, multiple)
    f_row = times(f_row, multiple)
    if not classes:
        y_row = times(y_row, multiple)
    if function != DOT:
        out_row = times(out_row, multiple)
    num_features = times(num_features, feature_multiple)
    features_row = times(features_row, feature_multiple)
    head_row = times(head_row, feature_multiple)
    direction_row = times(direction_row, feature_multiple)
    line = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)
    row_inside = line < num_rows
    row = tl.minimum(line, num_rows - 1)
    place = tl.arange(0, block_classes).to(tl.int64)
    inside = row_inside[:, None] & (place < num_classes)[None]
    f, z = products(
        features_ptr, head_ptr, direction_ptr, row, tl.minimum(place, num_classes - 1), num_features,
        features_row, features_column, head_row, head_column, direction_row, direction_column,
        block_features, even, precision,
    )  # fmt: skip
    if f_ptr is not None:
        f = tl.load(f_ptr + row[:, None] * f_row + place[None] * f_column, inside, 0.0).to(tl.float32)
    f = with_bias(f, head_bias_ptr, place, num_classes, head_bias_step)
    z = with_bias(z, direction_bias_ptr, place, num_classes, direction_bias_step)
    f = tl.where(inside, f, padding(loss))
    z = tl.where(inside, z, 0.0)
    y = z
    if reads_targets(loss, function):
        y = targets_of(y_ptr, row, row_inside, place, num_classes, y_row, y_column, classes)

    top = tl.full((block_rows,), float("-inf"), tl.float32)
    zero = tl.zeros((block_rows,), tl.float32)
    top, e_sum, y_sum, yz, ez, ee, eez = added(top, zero, zero, zero, zero, zero, zero, f, y, z, loss, function)
    if function == DOT:
        result = dot_of_sums(e_sum, y_sum, yz, ez, ee, eez, loss)
        tl.store(out_ptr + row, result.to(out_ptr.dtype.element_ty), row_inside)
    else:
        factor = scale
        if function != LABEL_TANGENT:
            factor = tl.full((block_rows,), 1.0, tl.float32)
            if weights_ptr is not None:
                factor = tl.load(weights_ptr + row * weights_step).to(tl.float32)
            factor = factor[:, None]
            if ones_ptr is not None:
                one = tl.full((block_rows,), 1.0, tl.float32)
                tl.store(ones_ptr + row, one.to(ones_ptr.dtype.element_ty), row_inside)
        if has_softmax(loss):
            top = finite(top)
        r = factor * entries(
            f, y, z, top[:, None], e_sum[:, None], y_sum[:, None], ez[:, None], ee[:, None], eez[:, None],
            loss, function,
        )  # fmt: skip
        tl.store(out_ptr + row[:, None] * out_row + place[None], r.to(out_ptr.dtype.element_ty), inside)


def tile(num_classes: int, dtype: torch.dtype, aligned: bool) -> Tile:
    """The smallest tile that holds all classes; float32 operands that are not aligned take fewer features at a time.

    Raises:
        ValueError: there are too many.
    """
    for one in TILES[dtype.itemsize]:
        if one.classes >= num_classes:
            return one if aligned or dtype.itemsize == 2 else one._replace(features=16, stages=2)
    raise ValueError(f"the fused form takes at most {_rule.MOST_FUSED_CLASSES} classes, got {num_classes}")


def arithmetic(precision: str) -> str:
    """``input_precision`` of its products: float32 ones take three TF32 products, as exact as float32's own."""
    return "tf32x3" if precision == "ieee" else precision


def is_aligned(num_features: int, *matrices: torch.Tensor | None) -> bool:
    """Whether the features of each matrix can be copied 16 bytes at a time."""
    for matrix in matrices:
        if matrix is not None:
            entries_16 = 16 // matrix.dtype.itemsize
            if (
                matrix.stride(1) != 1
                or matrix.stride(0) % entries_16
                or matrix.data_ptr() % 16
                or num_features % entries_16
            ):
                return False
    return True
