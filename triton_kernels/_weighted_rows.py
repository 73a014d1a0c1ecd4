"""``R = w r`` or ``R = w c(z)`` for rows that a program holds whole, with the sums of its columns.

The two row functions take the same operands in another order. One is a *product* of the features, the head's logits or
the tangent ``z = h V^T + b``, here multiplied already or multiplied in the kernel; the *other* one is read: targets for
the residual, logits for the curvature.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastmeta.triton_kernels import _tuning
from fastmeta.triton_kernels._products import logits_and_tangent, times
from fastmeta.triton_kernels._rows import curvature, padding, residual

MOST_CLASSES = 4096  # of a row in registers: 16 entries a thread of 8 warps, as many as no loss spills
ALIGNMENT = 16  # entries: rows of R begin at multiples of 16 bytes, whatever C is


# Vectors are read as vectors: a read of [1, C] or [N, 1] would impose its own layout on the tile.


@triton.jit
def hit(label, num_classes):
    """1; NaN for a class that does not exist: to raise would take a wait for the GPU."""
    return tl.where((label >= 0) & (label < num_classes), 1.0, float("nan"))


@triton.jit
def load_other(
    other_ptr, rows, columns, num_rows, num_classes, row_stride, column_stride, fill, classes: tl.constexpr
):  # fmt: skip
    """Targets or logits in float32; classes ``[N]`` as one-hot rows. ``[rows, columns]``."""
    if classes:
        label = tl.load(other_ptr + rows * row_stride, rows < num_rows, 0)
        inside = (rows < num_rows)[:, None] & (columns < num_classes)[None]
        one_hot = tl.where(label.to(tl.int32)[:, None] == columns.to(tl.int32)[None], 1.0, 0.0)
        return tl.where(inside, one_hot * hit(label, num_classes)[:, None], 0.0)
    else:
        inside = (rows < num_rows)[:, None] & (columns < num_classes)[None]
        place = rows[:, None] * row_stride + columns[None] * column_stride
        return tl.load(other_ptr + place, inside, fill).to(tl.float32)


@triton.jit
def load_bias(bias_ptr, columns, num_classes, stride):
    """A bias in float32, or 0. ``[1, columns]``."""
    if bias_ptr is None:
        return 0.0
    else:
        return tl.load(bias_ptr + columns * stride, columns < num_classes, 0.0).to(tl.float32)[None]


@triton.jit
def load_rows(pointer, rows, num_rows, stride):
    """A number for each row, in float32. ``[rows, 1]``."""
    return tl.load(pointer + rows * stride, rows < num_rows, 0.0).to(tl.float32)[:, None]


@triton.jit
def store_sums(partials_ptr, program, columns, num_classes, sums, begun):
    """The sums of a tile's columns as a program's partial sums, on top of those of the slabs before."""
    place = partials_ptr + program.to(tl.int64) * num_classes + columns
    valid = columns < num_classes
    tl.store(place, tl.sum(sums, 0) + tl.load(place, valid & (begun != 0), 0.0), valid)


@triton.jit
def fills(loss: tl.constexpr, curved: tl.constexpr):
    """What stands beyond the classes in the product and in the other operand."""
    if curved:
        return 0.0, padding(loss)
    else:
        return padding(loss), 0.0


@triton.jit
def _weighted(
    product, other, weights_ptr, rows, num_rows, weights_stride, inside, loss: tl.constexpr, curved: tl.constexpr
):  # fmt: skip
    r = curvature(other, product, loss) if curved else residual(product, other, loss)
    if weights_ptr is not None:
        r *= load_rows(weights_ptr, rows, num_rows, weights_stride)
    return tl.where(inside, r, 0.0)


@triton.jit(do_not_specialize=["num_rows", "tiles", "begun"])
def whole_rows(
    product_ptr, bias_ptr, other_ptr, weights_ptr, out_ptr, partials_ptr,
    num_rows, num_classes, tiles, begun,
    product_row, product_column, bias_stride, other_row, other_column, weights_stride, out_row,
    loss: tl.constexpr, curved: tl.constexpr, classes: tl.constexpr, multiple: tl.constexpr,
    block_rows: tl.constexpr, block_classes: tl.constexpr,
):  # fmt: skip
    """R from a product in memory, which R may overwrite; each program sums the columns of its rows."""
    num_classes = times(num_classes, multiple)
    product_row = times(product_row, multiple)
    other_row = times(other_row, 1 if classes else multiple)
    columns = tl.arange(0, block_classes).to(tl.int64)
    product_fill, other_fill = fills(loss, curved)
    bias = load_bias(bias_ptr, columns, num_classes, bias_stride)
    sums = tl.zeros([block_rows, block_classes], tl.float32)
    for tile in range(tiles):
        rows = (tl.program_id(0).to(tl.int64) * tiles + tile) * block_rows + tl.arange(0, block_rows)
        inside = (rows < num_rows)[:, None] & (columns < num_classes)[None]
        place = rows[:, None] * product_row + columns[None] * product_column
        product = tl.load(product_ptr + place, inside, product_fill).to(tl.float32) + bias
        other = load_other(
            other_ptr, rows, columns, num_rows, num_classes, other_row, other_column, other_fill, classes
        )  # fmt: skip
        r = _weighted(product, other, weights_ptr, rows, num_rows, weights_stride, inside, loss, curved)
        # Zeros up to the next row, so that a tile of R can be read in whole vectors.
        padded = (rows < num_rows)[:, None] & (columns < out_row)[None]
        tl.store(out_ptr + rows[:, None] * out_row + columns[None], r.to(out_ptr.dtype.element_ty), padded)
        sums += r
    if partials_ptr is not None:
        store_sums(partials_ptr, tl.program_id(0), columns, num_classes, sums, begun)


@triton.jit(do_not_specialize=["num_rows"])
def product_rows(
    features_ptr, factor_ptr, bias_ptr, other_ptr, weights_ptr, out_ptr,
    num_rows, num_features, num_classes,
    features_row, features_column, factor_row, factor_column, bias_stride,
    other_row, other_column, weights_stride, out_row,
    loss: tl.constexpr, curved: tl.constexpr, classes: tl.constexpr, multiple: tl.constexpr,
    even: tl.constexpr, precision: tl.constexpr,
    block_rows: tl.constexpr, block_classes: tl.constexpr, block_features: tl.constexpr,
):  # fmt: skip
    """R from the features: the product with the head or the direction is made here."""
    num_classes = times(num_classes, multiple)
    other_row = times(other_row, 1 if classes else multiple)
    rows = (tl.program_id(0) * block_rows + tl.arange(0, block_rows)).to(tl.int64)
    columns = tl.arange(0, block_classes).to(tl.int64)
    inside = (rows < num_rows)[:, None] & (columns < num_classes)[None]
    product_fill, other_fill = fills(loss, curved)
    product, _ = logits_and_tangent(
        features_ptr, factor_ptr, None, tl.minimum(rows, num_rows - 1), tl.minimum(columns, num_classes - 1),
        num_features, features_row, features_column, factor_row, factor_column, 0, 0,
        block_rows, block_classes, block_features, even, precision,
    )  # fmt: skip
    product += load_bias(bias_ptr, columns, num_classes, bias_stride)
    product = tl.where(inside, product, product_fill)
    other = load_other(
        other_ptr, rows, columns, num_rows, num_classes, other_row, other_column, other_fill, classes
    )  # fmt: skip
    r = _weighted(product, other, weights_ptr, rows, num_rows, weights_stride, inside, loss, curved)
    padded = (rows < num_rows)[:, None] & (columns < out_row)[None]
    tl.store(out_ptr + rows[:, None] * out_row + columns[None], r.to(out_ptr.dtype.element_ty), padded)


class WholeTile(NamedTuple):
    """Entries of a program's tile, in whole rows, and its warps."""

    entries: int
    warps: int


WHOLE_TILES = (WholeTile(1024, 4), WholeTile(2048, 4), WholeTile(4096, 8))


def block_of(num_classes: int) -> int:
    """Width of a tile that holds a whole row."""
    return max(triton.next_power_of_2(num_classes), 16)


def pitch_of(num_classes: int) -> int:
    """Entries from one row of R to the next."""
    return -(-num_classes // ALIGNMENT) * ALIGNMENT


def whole_tile(n: int, c: int, dtype: torch.dtype) -> WholeTile:
    """The largest tile that still gives every processor of a large GPU a program."""
    block = block_of(c)
    table = [tile for tile in WHOLE_TILES if tile.entries >= block]
    heuristic = table[0]
    for tile in table:
        if -(-n // (tile.entries // block)) >= 128:
            heuristic = tile
    return _tuning.tile("whole_rows", dtype, (n, c), table, heuristic)
