"""``R^T h + damping V`` with the sums of R's columns in the same launch, for the ``fused`` form; and sums of parts.

Every program owns a tile of the result and loops over the rows. Where the rows are many and the tiles few, the rows are
split among programs: the parts are written in float32 and a second stage adds them up in order. The number of parts
depends on the shape alone.

R comes in float32. Beside 16-bit features it is multiplied as a sum of two 16-bit numbers, which loses nothing that
counts: at the shapes of this form the second product costs less than the launch. Float32 features are multiplied as
``precision`` says.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmeta.triton_kernels import _tuning
from fastmeta.triton_kernels._launch import Launch
from fastmeta.triton_kernels._products import step, strides

_ENOUGH_PROGRAMS = 64  # half of a large GPU's processors: smaller tiles from there on only repeat reads
_LONG = 1024  # rows from which they are split, so that small shapes stay at one launch
_SHORTEST = 512  # rows of a part: eight steps and more
_MOST_PROGRAMS = 264  # that splitting aims at, two for every processor


@triton.jit(do_not_specialize=["num_rows", "rows_per_part"])
def _transposed_product(
    rows_ptr, features_ptr, addend_ptr, addend_bias_ptr, weight_ptr, bias_ptr, parts_ptr,
    num_rows, num_features, num_classes, rows_per_part, damping,
    rows_row, features_row, features_column, addend_row, addend_column, addend_bias_stride,
    precision: tl.constexpr, with_bias: tl.constexpr,
    block_classes: tl.constexpr, block_features: tl.constexpr, block_rows: tl.constexpr,
):  # fmt: skip
    c = (tl.program_id(0) * block_classes + tl.arange(0, block_classes)).to(tl.int64)
    d = (tl.program_id(1) * block_features + tl.arange(0, block_features)).to(tl.int64)
    begin = tl.program_id(2).to(tl.int64) * rows_per_part
    end = tl.minimum(begin + rows_per_part, num_rows)
    weight = tl.zeros([block_classes, block_features], tl.float32)
    sums = tl.zeros([block_classes, block_rows], tl.float32)
    for first in range(begin, end, block_rows):
        n = first + tl.arange(0, block_rows).to(tl.int64)
        # Beyond the classes R holds zeros up to the end of its row.
        r = tl.load(rows_ptr + n[None] * rows_row + c[:, None], (n < end)[None] & (c < rows_row)[:, None], 0.0)
        h = tl.load(
            features_ptr + n[:, None] * features_row + d[None] * features_column,
            (n < end)[:, None] & (d < num_features)[None], 0.0,
        )  # fmt: skip
        high = r.to(h.dtype)
        weight = tl.dot(high, h, weight, input_precision=precision)
        if h.dtype != tl.float32:
            rest = r - high.to(tl.float32)
            rest = tl.where(tl.abs(high.to(tl.float32)) == float("inf"), 0.0, rest).to(h.dtype)
            weight = tl.dot(rest, h, weight)
        if with_bias:
            sums += r
    width = num_features + (1 if with_bias else 0)
    inside = (c < num_classes)[:, None] & (d < num_features)[None]
    part = tl.program_id(2).to(tl.int64) * num_classes * width
    if parts_ptr is not None:
        tl.store(parts_ptr + part + c[:, None] * width + d[None], weight, inside)
    else:
        if addend_ptr is not None:
            addend = tl.load(addend_ptr + c[:, None] * addend_row + d[None] * addend_column, inside, 0.0)
            weight += damping * addend.to(tl.float32)
        place = c[:, None] * num_features + d[None]
        tl.store(weight_ptr + place, weight.to(weight_ptr.dtype.element_ty), inside)
    if with_bias:
        if tl.program_id(1) == 0:
            bias = tl.sum(sums, 1)
            if parts_ptr is not None:
                tl.store(parts_ptr + part + c * width + num_features, bias, c < num_classes)
            else:
                if addend_ptr is not None:
                    plus = tl.load(addend_bias_ptr + c * addend_bias_stride, c < num_classes, 0.0)
                    bias += damping * plus.to(tl.float32)
                tl.store(bias_ptr + c, bias.to(bias_ptr.dtype.element_ty), c < num_classes)


@triton.jit(do_not_specialize=["count", "num_classes"])
def _add_parts(
    parts_ptr, addend_ptr, addend_bias_ptr, weight_ptr, bias_ptr,
    count, num_features, num_classes, damping, addend_row, addend_column, addend_bias_stride,
    with_bias: tl.constexpr, block_parts: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Parts ``[count, C, D + 1]``, the last column being the bias; ``D`` is 0 where there is only that."""
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    width = num_features + (1 if with_bias else 0)
    size = num_classes.to(tl.int64) * width
    total = tl.zeros([block_parts, block], tl.float32)
    for first in range(0, count, block_parts):
        part = (first + tl.arange(0, block_parts)).to(tl.int64)[:, None]
        total += tl.load(parts_ptr + part * size + place[None], (part < count) & (place[None] < size), 0.0)
    result = tl.sum(total, 0)
    c, d = place // width, place % width
    if weight_ptr is not None:
        inside = (place < size) & (d < num_features)
        weight = result
        if addend_ptr is not None:
            addend = tl.load(addend_ptr + c * addend_row + d * addend_column, inside, 0.0)
            weight += damping * addend.to(tl.float32)
        tl.store(weight_ptr + c * num_features + d, weight.to(weight_ptr.dtype.element_ty), inside)
    if with_bias:
        last = (place < size) & (d == num_features)
        if addend_ptr is not None:
            plus = tl.load(addend_bias_ptr + c * addend_bias_stride, last, 0.0)
            result += damping * plus.to(tl.float32)
        tl.store(bias_ptr + c, result.to(bias_ptr.dtype.element_ty), last)


class Tile(NamedTuple):
    """Classes and features of a program's tile of the result, rows of a step, warps and stages."""

    classes: int
    features: int
    rows: int
    warps: int
    stages: int


# By bytes of an entry; from few large tiles to many small ones.
TILES = {
    2: (Tile(64, 64, 64, 4, 3), Tile(32, 64, 64, 4, 3), Tile(32, 32, 64, 4, 3), Tile(16, 32, 64, 4, 3)),
    4: (Tile(64, 64, 32, 8, 2), Tile(32, 64, 32, 4, 2), Tile(32, 32, 32, 4, 2), Tile(16, 32, 32, 4, 2)),
}


def _programs(n: int, d: int, c: int, tile: Tile) -> tuple[int, int]:
    """Tiles of the result, and parts of the rows."""
    tiles = triton.cdiv(c, tile.classes) * triton.cdiv(d, tile.features)
    return tiles, 1 if n <= _LONG else max(1, min(_MOST_PROGRAMS // tiles, n // _SHORTEST))


def _tile(n: int, d: int, c: int, dtype: torch.dtype) -> Tile:
    table = TILES[dtype.itemsize]
    enough = (tile for tile in table if math.prod(_programs(n, d, c, tile)) >= _ENOUGH_PROGRAMS)
    return _tuning.tile("transposed_product", dtype, (n, d, c), table, next(enough, table[-1]))


class SumOfParts:
    """``sum_k parts[k] + damping addend``; the launch of :func:`_add_parts`.

    Args:
        count: number of parts.
        d: columns of the weight; 0 where only the bias is summed.
        c: classes.
        with_bias: whether the parts hold a bias.
    """

    def __init__(self, count: int, d: int, c: int, with_bias: bool) -> None:
        self.sizes = count, d, c
        block_parts, block = (32, 32) if d == 0 else (min(triton.next_power_of_2(count), 16), 128)
        constants = {"with_bias": with_bias, "block_parts": block_parts, "block": block}
        self.launch = Launch(_add_parts, (triton.cdiv(c * (d + with_bias), block),), constants)

    def __call__(
        self,
        parts: Tensor,  # [count, C, D + 1] or [count, C, D]
        addend: Tensor | None,  # [C, D]
        addend_bias: Tensor | None,  # [C]
        weight: Tensor | None,  # [C, D]
        bias: Tensor,  # [C]
        damping: float,
    ) -> None:
        self.launch(parts, addend, addend_bias, weight, bias, *self.sizes, damping, *strides(addend), step(addend_bias))


class TransposedProduct:
    """``R^T h + damping V`` and ``sum_i R_i + damping b`` in one launch, or in two.

    Args:
        n: rows.
        d: features.
        c: classes.
        dtype: of the features and the result.
        precision: of float32 products.
        with_bias: whether the columns of R are summed.
    """

    def __init__(self, n: int, d: int, c: int, dtype: torch.dtype, precision: str, with_bias: bool) -> None:
        tile = _tile(n, d, c, dtype)
        _, parts = _programs(n, d, c, tile)
        rows_per_part = triton.cdiv(n, parts * tile.rows) * tile.rows
        parts = triton.cdiv(n, rows_per_part)
        self.sizes = n, d, c, rows_per_part
        grid = triton.cdiv(c, tile.classes), triton.cdiv(d, tile.features), parts
        constants = {"precision": precision, "with_bias": with_bias}
        constants |= {"block_classes": tile.classes, "block_features": tile.features, "block_rows": tile.rows}
        self.launch = Launch(
            _transposed_product, grid, constants, num_warps=tile.warps, num_stages=tile.stages, max_registers=255
        )  # fmt: skip
        self.parts_shape = parts, c, d + with_bias
        self.sum = SumOfParts(parts, d, c, with_bias) if parts > 1 else None

    def __call__(
        self,
        rows: Tensor,  # [N, pitch] in float32
        features: Tensor,  # [N, D]
        addend: Tensor | None,  # [C, D]
        addend_bias: Tensor | None,  # [C]
        weight: Tensor,  # [C, D]
        bias: Tensor,  # [C] or [0]
        damping: float,
    ) -> None:
        parts = None
        if self.sum is not None:
            parts = torch.empty(self.parts_shape, dtype=torch.float32, device=rows.device)
        self.launch(
            rows, features, addend, addend_bias, weight, bias, parts, *self.sizes, damping,
            rows.stride(0), *features.stride(), *strides(addend), step(addend_bias),
        )  # fmt: skip
        if self.sum is not None:
            self.sum(parts, addend, addend_bias, weight, bias, damping)
