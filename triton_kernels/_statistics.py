"""Statistics of rows that are too long to hold: with them R is a function of single entries.

One sweep over the classes keeps the running maximum of a row and the sums of ``e = exp(f - max)`` that its row function
needs; sums so far are scaled down when the maximum rises. The product may be in memory or made tile by tile, and is
then never written. Parts of the classes may go to several programs; a second launch joins them. It leaves, with
``p = scale e`` (``s p = scale e`` for the cross-entropy's residual):

=========================  ======================================================
residual, cross_entropy    maximum, scale                ``r = scale e - y``
residual, mse_probs        maximum, scale, <p, p - y>    ``r = 2 p (p - y - mean)``
curvature, cross_entropy   maximum, scale, <p, z>        ``c = p (z - mean)``
curvature, mse_probs       maximum, scale, <p, z>, <p, u>, ``u = p (z - <p, z>)``  ``c = 2 p (u - <p, u>)``
=========================  ======================================================
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmeta.triton_kernels import _tuning
from fastmeta.triton_kernels._launch import Launch
from fastmeta.triton_kernels._products import (
    ProductTile,
    flash_tiles,
    logits_and_tangent,
    parts,
    product_tile,
    splits,
    step,
    strides,
    times,
)
from fastmeta.triton_kernels._products import (
    columns as columns_of,
)
from fastmeta.triton_kernels._rows import CROSS_ENTROPY, MSE_PROBS, curvature, residual
from fastmeta.triton_kernels._weighted_rows import fills, hit, load_bias, load_other, load_rows, store_sums

SUMS = 5  # maximum, sum of e, and up to three that depend on the row function
STATISTICS = 4
MOST_REGISTERS = 255  # that a thread can have


@triton.jit
def _rise(top, candidate):
    """The larger of two maxima, what exponents are relative to, and the factors of the sums that either has."""
    both = tl.maximum(top, candidate)
    reference = tl.where(both == float("-inf"), 0.0, both)  # sums of nothing but -inf stay 0
    return both, reference, tl.exp(top - reference), tl.exp(candidate - reference)


@triton.jit
def _add(
    top, total, first_sum, second_sum, third_sum, product, first,  # of a tile of classes from the first on
    bias_ptr, other_ptr, rows, num_rows, num_classes, bias_stride, other_row, other_column,
    loss: tl.constexpr, curved: tl.constexpr, classes: tl.constexpr,
):  # fmt: skip
    columns = (first + tl.arange(0, product.shape[1])).to(tl.int64)
    inside = (rows < num_rows)[:, None] & (columns < num_classes)[None]
    product_fill, other_fill = fills(loss, curved)
    product = tl.where(inside, product + load_bias(bias_ptr, columns, num_classes, bias_stride), product_fill)
    if loss == CROSS_ENTROPY and classes:
        f = product
    else:
        other = load_other(
            other_ptr, rows, columns, num_rows, num_classes, other_row, other_column, other_fill, classes
        )  # fmt: skip
        f = other if curved else product
    top, reference, kept, _ = _rise(top, tl.max(f, 1))
    e = tl.exp(f - reference[:, None])
    total = total * kept + tl.sum(e, 1)
    if curved:
        first_sum = first_sum * kept + tl.sum(e * product, 1)
        if loss == MSE_PROBS:
            second_sum = second_sum * kept * kept + tl.sum(e * e, 1)
            third_sum = third_sum * kept * kept + tl.sum(e * e * product, 1)
    elif loss == MSE_PROBS:
        first_sum = first_sum * kept + tl.sum(e * other, 1)
        second_sum = second_sum * kept * kept + tl.sum(e * e, 1)
    elif not classes:
        first_sum += tl.sum(other, 1)
    return top, total, first_sum, second_sum, third_sum


@triton.jit(do_not_specialize=["num_rows"])
def sweep(
    product_ptr, features_ptr, factor_ptr, bias_ptr, other_ptr, sums_ptr,
    num_rows, num_features, num_classes, steps,
    product_row, product_column, features_row, features_column, factor_row, factor_column, bias_stride,
    other_row, other_column,
    loss: tl.constexpr, curved: tl.constexpr, classes: tl.constexpr, multiple: tl.constexpr,
    even: tl.constexpr, precision: tl.constexpr, parts: tl.constexpr,
    block_rows: tl.constexpr, block_classes: tl.constexpr, block_features: tl.constexpr,
):  # fmt: skip
    """Sums ``[shares, 5, N]``, each over ``steps`` tiles of classes."""
    num_classes = times(num_classes, multiple)
    product_row = times(product_row, multiple)
    other_row = times(other_row, 1 if classes else multiple)
    rows = (tl.program_id(0) * block_rows + tl.arange(0, block_rows)).to(tl.int64)
    product_fill, _other_fill = fills(loss, curved)
    top = tl.full([block_rows], float("-inf"), tl.float32)
    total = tl.zeros([block_rows], tl.float32)
    first_sum, second_sum, third_sum = total, total, total
    if loss == CROSS_ENTROPY and classes:
        label = tl.load(other_ptr + rows * other_row, rows < num_rows, 0)
        first_sum += tl.where(tl.program_id(1) == 0, hit(label, num_classes), 0.0)
    for tile in range(steps):
        first = (tl.program_id(1) * steps + tile) * block_classes
        columns = (first + tl.arange(0, block_classes)).to(tl.int64)
        if features_ptr is None:
            inside = (rows < num_rows)[:, None] & (columns < num_classes)[None]
            place = rows[:, None] * product_row + columns[None] * product_column
            product = tl.load(product_ptr + place, inside, product_fill).to(tl.float32)
        else:
            product, _ = logits_and_tangent(
                features_ptr, factor_ptr, None, tl.minimum(rows, num_rows - 1), tl.minimum(columns, num_classes - 1),
                num_features, features_row, features_column, factor_row, factor_column, 0, 0,
                block_rows, block_classes, block_features, even, precision,
            )  # fmt: skip
            # As the library will round it for R: means of other numbers would not cancel theirs.
            product = product.to(features_ptr.dtype.element_ty).to(tl.float32)
        # A program's registers do not hold all that follows for a large tile.
        for part in tl.static_range(parts):
            top, total, first_sum, second_sum, third_sum = _add(
                top, total, first_sum, second_sum, third_sum,
                columns_of(product, part, parts), first + part * (block_classes // parts),
                bias_ptr, other_ptr, rows, num_rows, num_classes, bias_stride, other_row, other_column,
                loss, curved, classes,
            )  # fmt: skip
    out = sums_ptr + tl.program_id(1).to(tl.int64) * 5 * num_rows + rows
    valid = rows < num_rows
    tl.store(out, top, valid)
    tl.store(out + num_rows, total, valid)
    tl.store(out + 2 * num_rows, first_sum, valid)
    if loss == MSE_PROBS:
        tl.store(out + 3 * num_rows, second_sum, valid)
        if curved:
            tl.store(out + 4 * num_rows, third_sum, valid)


@triton.jit(do_not_specialize=["num_rows", "shares"])
def join(
    sums_ptr, statistics_ptr, num_rows, shares, loss: tl.constexpr, curved: tl.constexpr, block_rows: tl.constexpr
):  # fmt: skip
    """Statistics ``[4, N]`` from the sums of all shares, in their order."""
    rows = (tl.program_id(0) * block_rows + tl.arange(0, block_rows)).to(tl.int64)
    valid = rows < num_rows
    top = tl.full([block_rows], float("-inf"), tl.float32)
    reference = tl.zeros([block_rows], tl.float32)
    total = tl.zeros([block_rows], tl.float32)
    first_sum, second_sum, third_sum = total, total, total
    sums = sums_ptr + rows
    for _ in range(shares):
        top, reference, kept, fade = _rise(top, tl.load(sums, valid, 0.0))
        total = total * kept + fade * tl.load(sums + num_rows, valid, 0.0)
        first = tl.load(sums + 2 * num_rows, valid, 0.0)
        if loss == CROSS_ENTROPY and not curved:
            first_sum += first
        else:
            first_sum = first_sum * kept + fade * first
        if loss == MSE_PROBS:
            second_sum = second_sum * kept * kept + fade * fade * tl.load(sums + 3 * num_rows, valid, 0.0)
            if curved:
                third_sum = third_sum * kept * kept + fade * fade * tl.load(sums + 4 * num_rows, valid, 0.0)
        sums += 5 * num_rows
    scale = 1.0 / total
    out = statistics_ptr + rows
    tl.store(out, reference, valid)
    if loss == CROSS_ENTROPY and not curved:
        tl.store(out + num_rows, scale * first_sum, valid)
    else:
        tl.store(out + num_rows, scale, valid)
        mean = scale * first_sum  # <p, z>, or <p, y>
        square = scale * scale * second_sum  # <p, p>
        tl.store(out + 2 * num_rows, mean if curved else square - mean, valid)
        if curved and loss == MSE_PROBS:
            tl.store(out + 3 * num_rows, scale * scale * third_sum - mean * square, valid)


@triton.jit(do_not_specialize=["num_rows", "steps", "begun", "statistics_row"])
def rows_of_statistics(
    product_ptr, bias_ptr, other_ptr, weights_ptr, statistics_ptr, out_ptr, partials_ptr,
    num_rows, num_classes, first_class, steps, begun, statistics_row,
    product_row, product_column, bias_stride, other_row, other_column, weights_stride, out_row,
    loss: tl.constexpr, curved: tl.constexpr, classes: tl.constexpr, multiple: tl.constexpr,
    block_rows: tl.constexpr, block_classes: tl.constexpr,
):  # fmt: skip
    """R for the classes from ``first_class`` on, whose product it may overwrite, and the sums of its columns."""
    num_classes = times(num_classes, multiple)
    product_row = times(product_row, multiple)
    other_row = times(other_row, 1 if classes else multiple)
    local = (tl.program_id(0) * block_classes + tl.arange(0, block_classes)).to(tl.int64)
    columns = first_class + local
    product_fill, other_fill = fills(loss, curved)
    bias = load_bias(bias_ptr, columns, num_classes, bias_stride)
    sums = tl.zeros([block_rows, block_classes], tl.float32)
    for tile in range(steps):
        rows = (tl.program_id(1).to(tl.int64) * steps + tile) * block_rows + tl.arange(0, block_rows)
        inside = (rows < num_rows)[:, None] & (columns < num_classes)[None]
        place = rows[:, None] * product_row + local[None] * product_column
        product = tl.load(product_ptr + place, inside, product_fill).to(tl.float32) + bias
        other = load_other(
            other_ptr, rows, columns, num_rows, num_classes, other_row, other_column, other_fill, classes
        )  # fmt: skip
        if loss == CROSS_ENTROPY or loss == MSE_PROBS:
            e = tl.exp((other if curved else product) - load_rows(statistics_ptr, rows, num_rows, 1))
            p = e * load_rows(statistics_ptr + statistics_row, rows, num_rows, 1)
            if curved or loss == MSE_PROBS:
                mean = load_rows(statistics_ptr + 2 * statistics_row, rows, num_rows, 1)
            if curved:
                r = p * (product - mean)
                if loss == MSE_PROBS:
                    r = 2.0 * p * (r - load_rows(statistics_ptr + 3 * statistics_row, rows, num_rows, 1))
            elif loss == MSE_PROBS:
                r = 2.0 * p * (p - other - mean)
            else:
                r = p - other
        else:
            r = curvature(other, product, loss) if curved else residual(product, other, loss)
        if weights_ptr is not None:
            r *= load_rows(weights_ptr, rows, num_rows, weights_stride)
        r = tl.where(inside, r, 0.0)
        tl.store(out_ptr + rows[:, None] * out_row + local[None], r.to(out_ptr.dtype.element_ty), inside)
        sums += r
    if partials_ptr is not None:
        store_sums(partials_ptr, tl.program_id(1), columns, num_classes, sums, begun)


class SweepTile(NamedTuple):
    """Rows and classes of a tile where the product is in memory, and warps."""

    rows: int
    classes: int
    warps: int


SWEEP_TILES = (SweepTile(1, 4096, 8), SweepTile(2, 2048, 8))


class RowsTile(NamedTuple):
    """Rows and classes of a tile, and warps."""

    rows: int
    classes: int
    warps: int


ROWS_TILES = (RowsTile(16, 256, 8), RowsTile(8, 256, 4))


def rows_tile(n: int, c: int, dtype: torch.dtype) -> RowsTile:
    """The tile of :func:`rows_of_statistics`."""
    return _tuning.tile("rows_of_statistics", dtype, (n, c), ROWS_TILES, ROWS_TILES[0])


class Sweep:
    """The launches that leave the statistics ``[4, N]`` of N rows.

    Args:
        n: most rows of a call.
        d: features; of no matter where the product is in memory.
        c: classes.
        dtype: of the operands.
        precision: of float32 products.
        product: whether the product is made here.
        loss: the loss's number.
        curved: the curvature, not the residual.
        classes: whether targets are classes.
        multiple: divides C and the rows' strides, see :func:`._products.multiple`.
        aligned: the product's operands, see :func:`._products.aligned`.
    """

    def __init__(
        self, n: int, d: int, c: int, dtype: torch.dtype, precision: str, *,
        product: bool, loss: int, curved: bool, classes: bool, multiple: int, aligned: bool,
    ) -> None:  # fmt: skip
        tile: SweepTile | ProductTile
        row_function = {"loss": loss, "curved": curved}
        if product:
            # Beside 64 entries of the product a thread has no registers for a matrix whose rows are not aligned.
            table = tuple(
                tile
                for tile in flash_tiles(dtype, precision, 1, aligned)
                if classes or tile.rows * tile.classes < 2048 * tile.warps
            )
            tile = _tuning.tile("sweep_product", dtype, (n, d, c), table, product_tile(n, table))
            inner = {"even": d % tile.features == 0, "precision": precision, "parts": parts(tile, 2)}
            features, stages = tile.features, tile.stages
        else:
            tile = _tuning.tile("sweep", dtype, (n, c), SWEEP_TILES, SWEEP_TILES[0])
            inner, features, stages = {"even": True, "precision": precision, "parts": 1}, 0, 1
        blocks, tiles = triton.cdiv(n, tile.rows), triton.cdiv(c, tile.classes)
        steps = triton.cdiv(tiles, splits(blocks, tiles))
        self.shares = triton.cdiv(tiles, steps)
        self.multiple = multiple
        self.sizes = d if product else 0, c // multiple, steps
        constants = row_function | {"classes": classes, "multiple": multiple} | inner
        constants |= {"block_rows": tile.rows, "block_classes": tile.classes, "block_features": features}
        self.sweep = Launch(
            sweep,
            (blocks, self.shares),
            constants,
            num_warps=tile.warps,
            num_stages=stages,
            max_registers=MOST_REGISTERS,
        )
        self.join = Launch(join, (triton.cdiv(n, 128),), row_function | {"block_rows": 128})

    def __call__(
        self,
        num_rows: int,
        product: Tensor | None,  # [N, C], or made of
        features: Tensor | None,  # [N, D] and
        factor: Tensor | None,  # [C, D]
        bias: Tensor | None,  # [C]
        other: Tensor,  # [N, C], or classes [N]
    ) -> Tensor:  # [4, N]
        sums = torch.empty((self.shares, SUMS, num_rows), dtype=torch.float32, device=other.device)
        statistics = torch.empty((STATISTICS, num_rows), dtype=torch.float32, device=other.device)
        self.sweep(
            product, features, factor, bias, other, sums, num_rows, *self.sizes,
            *divided(product, self.multiple), *strides(features), *strides(factor), step(bias),
            *divided(other, self.multiple),
        )  # fmt: skip
        self.join(sums, statistics, num_rows, self.shares)
        return statistics


def divided(matrix: Tensor | None, multiple: int) -> tuple[int, int]:
    """Strides for a kernel that multiplies the first; classes have one, which it does not."""
    if matrix is None:
        return 0, 0
    row, *column = matrix.stride()
    return (row // multiple, column[0]) if column else (row, 0)
