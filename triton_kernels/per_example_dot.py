"""``<r_i, z_i>`` with ``z = h V^T + b``: one sweep over the classes of a row, whatever its length.

With ``e = exp(f - max f)`` and sums over the classes, the dot product is

    cross_entropy   sum y * (sum e z / sum e) - sum y z
    mse_probs       2 / sum e * (sum e e z / sum e - sum e y z - (sum e e / sum e - sum e y) * sum e z / sum e)

and a plain sum of ``r z`` for the two other losses. One kernel makes these sums; its tiles of ``z`` come from memory
(``rows``) or from the product of ``h`` and ``V`` in the same launch (``fused``: all classes in one tile; ``flash``:
tile by tile). Where the rows alone do not fill the GPU, several programs share the classes of a row and a second
kernel merges their sums.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmeta import checks
from fastmeta.triton_kernels import _arguments, _forms, _tuning
from fastmeta.triton_kernels._launch import INTERPRETED, Launch, Plans, layout, on_device, precision
from fastmeta.triton_kernels._online_softmax import rise, shares_scale
from fastmeta.triton_kernels._products import (
    ROW_TILES,
    ProductTile,
    RowTile,
    aligned,
    columns,
    flash_tiles,
    fused_tiles,
    library_product,
    logits_and_tangent,
    multiple,
    offered,
    parts,
    product_tile,
    registers,
    row_tile,
    scratch,
    splits,
    step,
    strides,
    times,
)
from fastmeta.triton_kernels._rows import BINARY_CROSS_ENTROPY, CROSS_ENTROPY, MSE, MSE_PROBS, padding, sigmoid

# Rows are read once, whatever their length: longer tiles would only take more registers.
_ROW_TILES = ROW_TILES[:-1]
_SUMS = {0: 5, 1: 1, 2: 1, 3: 7}  # of each loss, in the order of _store


@triton.jit
def _finish(yz, e, ez, y, ee, eez, loss: tl.constexpr):
    if loss == CROSS_ENTROPY:
        return y * (ez / e) - yz
    elif loss == MSE_PROBS:
        return 2.0 * ((eez / e - yz) - (ee / e - y) * (ez / e)) / e
    else:
        return yz


@triton.jit
def _store(pointer, stride, top, yz, e, ez, y, ee, eez, inside, loss: tl.constexpr):
    tl.store(pointer, yz, inside)
    if loss == CROSS_ENTROPY or loss == MSE_PROBS:
        tl.store(pointer + stride, top, inside)
        tl.store(pointer + 2 * stride, e, inside)
        tl.store(pointer + 3 * stride, ez, inside)
        tl.store(pointer + 4 * stride, y, inside)
    if loss == MSE_PROBS:
        tl.store(pointer + 5 * stride, ee, inside)
        tl.store(pointer + 6 * stride, eez, inside)


@triton.jit
def _add(
    f, z, place,  # [rows, classes], [classes]; f counts where no logits are given
    top, yz, e_sum, ez, y_sum, ee, eez,
    logits_ptr, head_bias_ptr, targets_ptr, bias_ptr, target, hit, row, logits_first, num_classes,
    logits_row, logits_column, head_bias_step, targets_row, targets_column, bias_step,
    loss: tl.constexpr,
):  # fmt: skip
    there = place < num_classes
    inside = there[None]
    if logits_ptr is not None:
        f_ptr = logits_ptr + (row - logits_first)[:, None] * logits_row + place[None] * logits_column
        f = tl.load(f_ptr, inside, 0.0).to(tl.float32)
    if head_bias_ptr is not None:
        f += tl.load(head_bias_ptr + place * head_bias_step, there, 0.0).to(tl.float32)[None]
    if bias_ptr is not None:
        z += tl.load(bias_ptr + place * bias_step, there, 0.0).to(tl.float32)[None]
    f = tl.where(inside, f, padding(loss))
    z = tl.where(inside, z, 0.0)
    if targets_column is None:
        y = tl.where(place[None] == target[:, None], 1.0, 0.0) * hit[:, None]
    else:
        y_ptr = targets_ptr + row[:, None] * targets_row + place[None] * targets_column
        # Not straight from the load into a sum: a pass of Triton 3.6 fails on two such sums in one loop.
        y = tl.where(inside, tl.load(y_ptr, inside, 0.0).to(tl.float32), 0.0)

    if loss == BINARY_CROSS_ENTROPY:
        yz += tl.sum((sigmoid(f) - y) * z, 1)
    elif loss == MSE:
        yz += tl.sum(2.0 * (f - y) * z, 1)
    else:
        top, reference, kept = rise(top, f)
        e = tl.exp(f - reference[:, None])
        if loss == CROSS_ENTROPY:
            y_sum += tl.sum(y, 1)
            yz += tl.sum(y * z, 1)
        else:
            y_sum = y_sum * kept + tl.sum(e * y, 1)
            yz = yz * kept + tl.sum(e * y * z, 1)
            ee = ee * kept * kept + tl.sum(e * e, 1)
            eez = eez * kept * kept + tl.sum(e * e * z, 1)
        e_sum = e_sum * kept + tl.sum(e, 1)
        ez = ez * kept + tl.sum(e * z, 1)
    return top, yz, e_sum, ez, y_sum, ee, eez


@triton.jit(do_not_specialize=["first_row", "end_row", "logits_first", "num_rows"])
def _sweep(
    features_ptr, logits_ptr, head_ptr, head_bias_ptr, targets_ptr, direction_ptr, bias_ptr, tangent_ptr, out_ptr,
    first_row, end_row, logits_first, num_rows, num_features, num_classes, tiles,
    features_row, features_column, logits_row, logits_column, head_row, head_column, head_bias_step,
    targets_row, targets_column, direction_row, direction_column, bias_step,
    loss: tl.constexpr, partial: tl.constexpr, block_rows: tl.constexpr, block_classes: tl.constexpr,
    parts: tl.constexpr, block_features: tl.constexpr, even: tl.constexpr, precision: tl.constexpr,
    class_multiple: tl.constexpr, feature_multiple: tl.constexpr,
):  # fmt: skip
    """Rows first_row to end_row; ``tiles`` tiles of classes from the program's share on.

    A tangent [slab, C] begins at first_row, the logits at logits_first. Output: ``[N]``, or the sums
    ``[shares, sums, N]``.
    """
    num_classes *= class_multiple
    num_features *= feature_multiple
    features_row = times(features_row, feature_multiple)
    head_row = times(head_row, feature_multiple)
    direction_row = times(direction_row, feature_multiple)
    logits_row = times(logits_row, class_multiple)
    if targets_column is not None:
        targets_row = times(targets_row, class_multiple)
    line = first_row + tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)
    row = tl.minimum(line, end_row - 1)
    share = tl.program_id(1).to(tl.int64)

    top = tl.full((block_rows,), float("-inf"), tl.float32)
    yz = tl.zeros((block_rows,), tl.float32)
    e_sum = tl.zeros((block_rows,), tl.float32)
    ez = tl.zeros((block_rows,), tl.float32)
    y_sum = tl.zeros((block_rows,), tl.float32)  # of e y for mse_probs
    ee = tl.zeros((block_rows,), tl.float32)
    eez = tl.zeros((block_rows,), tl.float32)
    target = row
    hit = yz
    if targets_column is None:
        target = tl.load(targets_ptr + row * targets_row)
        # A class that does not exist makes its row NaN: to raise would take a wait for the GPU.
        hit = tl.where((target >= 0) & (target < num_classes), 1.0, float("nan"))

    for tile in range(tiles):
        first = (share * tiles + tile) * block_classes
        if tangent_ptr is None:
            column = tl.minimum(first + tl.arange(0, block_classes), num_classes - 1)
            f, z = logits_and_tangent(
                features_ptr, head_ptr, direction_ptr, row, column, num_features,
                features_row, features_column, head_row, head_column, direction_row, direction_column,
                block_rows, block_classes, block_features, even, precision,
            )  # fmt: skip
        else:
            place = first + tl.arange(0, block_classes)
            z_ptr = tangent_ptr + (row - first_row)[:, None] * num_classes + place[None]
            z = tl.load(z_ptr, (place < num_classes)[None], 0.0).to(tl.float32)
            f = z
        # A program's registers do not hold all that follows for a large tile.
        for part in tl.static_range(parts):
            f_part = columns(f, part, parts)
            z_part = columns(z, part, parts)
            place = first + part * (block_classes // parts) + tl.arange(0, block_classes // parts)
            top, yz, e_sum, ez, y_sum, ee, eez = _add(
                f_part, z_part, place, top, yz, e_sum, ez, y_sum, ee, eez,
                logits_ptr, head_bias_ptr, targets_ptr, bias_ptr, target, hit, row, logits_first, num_classes,
                logits_row, logits_column, head_bias_step, targets_row, targets_column, bias_step, loss,
            )  # fmt: skip

    row_inside = line < end_row
    if partial:
        sums: tl.constexpr = 7 if loss == MSE_PROBS else 5 if loss == CROSS_ENTROPY else 1
        out_ptr += share * sums * num_rows + row
        _store(out_ptr, num_rows.to(tl.int64), top, yz, e_sum, ez, y_sum, ee, eez, row_inside, loss)
    else:
        result = _finish(yz, e_sum, ez, y_sum, ee, eez, loss)
        tl.store(out_ptr + row, result.to(out_ptr.dtype.element_ty), row_inside)


@triton.jit(do_not_specialize=["num_rows", "shares"])
def _merge(
    sums_ptr, out_ptr, num_rows, shares,
    loss: tl.constexpr, block_rows: tl.constexpr, block_shares: tl.constexpr,
):  # fmt: skip
    """The shares' sums ``[shares, sums, N]`` as one result ``[N]``."""
    row = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)
    share = tl.arange(0, block_shares).to(tl.int64)
    inside = (row < num_rows)[:, None] & (share < shares)[None]
    sums: tl.constexpr = 7 if loss == MSE_PROBS else 5 if loss == CROSS_ENTROPY else 1
    stride = num_rows.to(tl.int64)
    pointer = sums_ptr + share[None] * (sums * stride) + row[:, None]
    yz = tl.load(pointer, inside, 0.0)
    e = yz
    ez = yz
    y = yz
    ee = yz
    eez = yz
    if loss == CROSS_ENTROPY or loss == MSE_PROBS:
        scale = shares_scale(tl.load(pointer + stride, inside, float("-inf")))
        e = tl.load(pointer + 2 * stride, inside, 0.0) * scale
        ez = tl.load(pointer + 3 * stride, inside, 0.0) * scale
        y = tl.load(pointer + 4 * stride, inside, 0.0)
        if loss == MSE_PROBS:
            y *= scale
            yz *= scale
            ee = tl.load(pointer + 5 * stride, inside, 0.0) * scale * scale
            eez = tl.load(pointer + 6 * stride, inside, 0.0) * scale * scale
    result = _finish(tl.sum(yz, 1), tl.sum(e, 1), tl.sum(ez, 1), tl.sum(y, 1), tl.sum(ee, 1), tl.sum(eez, 1), loss)
    tl.store(out_ptr + row, result.to(out_ptr.dtype.element_ty), row < num_rows)


class _Plan:
    """Form, tile and launches for one layout of the arguments."""

    def __init__(
        self,
        features: Tensor,
        logits: Tensor | None,
        head_weight: Tensor | None,
        head_bias: Tensor | None,
        targets: Tensor,
        direction_weight: Tensor,
        direction_bias: Tensor | None,
        loss: int,
    ) -> None:
        _arguments.loss(loss)
        n, d, c = _arguments.outputs(features, logits, head_weight, head_bias)
        checks.targets(targets, features, c)
        _arguments.direction(features, c, direction_weight, direction_bias)
        self.sizes = n, c
        self.empty = n == 0 or c == 0
        if self.empty:
            return
        head, dtype = head_weight is not None, features.dtype
        arithmetic = precision(dtype)
        operands_aligned = aligned(d, features, head_weight, direction_weight)
        fused = fused_tiles(c, dtype, arithmetic, operands_aligned)
        form = _forms.choose(
            "per_example_dot", n, d, c, dtype, head, precision=arithmetic, offered=offered(fused, operands_aligned)
        )
        logits_row, logits_column = (c, 1) if head and form == "rows" else strides(logits)
        targets_row, targets_column = targets.stride() if targets.dim() == 2 else (targets.stride(0), None)
        class_multiple = multiple(c, logits_row, targets_row if targets.dim() == 2 else 0)
        feature_multiple = 1
        tile: RowTile | ProductTile
        if form == "rows":
            self.slab = _forms.slab_rows(n, (1 + head) * c * dtype.itemsize)
            tile = _tuning.tile("per_example_dot rows", dtype, (c,), _ROW_TILES, row_tile(c, _ROW_TILES))
            inner = {"parts": 1, "block_features": 0, "even": True}
            stages = 1
        else:
            self.slab = 0
            table = fused if form == "fused" else flash_tiles(dtype, arithmetic, 1 + head, operands_aligned)
            tile = _tuning.tile(f"per_example_dot {form}", dtype, (n, d, c), table, product_tile(n, table))
            inner = {"parts": parts(tile, 1 + head), "block_features": tile.features, "even": d % tile.features == 0}
            stages = tile.stages
            feature_multiple = multiple(d, features.stride(0), strides(head_weight)[0], direction_weight.stride(0))
        class_tiles = triton.cdiv(c, tile.classes)
        row_blocks = triton.cdiv(self.slab or n, tile.rows)
        self.tiles = triton.cdiv(class_tiles, splits(row_blocks, class_tiles))
        self.shares = triton.cdiv(class_tiles, self.tiles)
        blocks = {"block_rows": tile.rows, "block_classes": tile.classes}
        constants = {
            "loss": loss,
            "partial": self.shares > 1,
            **blocks,
            **inner,
            "precision": arithmetic,
            "class_multiple": class_multiple,
            "feature_multiple": feature_multiple,
        }
        self.sweep = Launch(
            _sweep,
            (row_blocks, self.shares),
            constants,
            num_warps=tile.warps,
            num_stages=stages,
            max_registers=registers(tile.warps),
        )
        self.sums = self.shares, _SUMS[loss], n
        merged = {"loss": loss, "block_rows": _MERGED_ROWS, "block_shares": triton.next_power_of_2(self.shares)}
        self.merge = Launch(_merge, (triton.cdiv(n, _MERGED_ROWS),), merged)
        self.counts = d // feature_multiple, c // class_multiple, self.tiles
        self.strides = (
            features.stride(0) // feature_multiple,
            features.stride(1),
            logits_row // class_multiple,
            logits_column,
            strides(head_weight)[0] // feature_multiple,
            strides(head_weight)[1],
            step(head_bias),
            targets_row // class_multiple if targets.dim() == 2 else targets_row,
            targets_column,
            direction_weight.stride(0) // feature_multiple,
            direction_weight.stride(1),
            step(direction_bias),
        )

    def __call__(
        self,
        features: Tensor,
        logits: Tensor | None,
        head_weight: Tensor | None,
        head_bias: Tensor | None,
        targets: Tensor,
        direction_weight: Tensor,
        direction_bias: Tensor | None,
    ) -> Tensor:
        n, c = self.sizes
        out = torch.empty(n, dtype=features.dtype, device=features.device)
        if self.empty:
            return out.zero_()
        into = out if self.shares == 1 else torch.empty(self.sums, dtype=torch.float32, device=features.device)
        if not self.slab:
            self.sweep(
                features, logits, head_weight, head_bias, targets, direction_weight, direction_bias, None, into,
                0, n, 0, n, *self.counts, *self.strides,
            )  # fmt: skip
        else:
            memory = scratch(self.slab, n, c, features)
            head_memory = None if head_weight is None else scratch(self.slab, n, c, features)
            for first in range(0, n, self.slab):
                end = min(first + self.slab, n)
                tangent = library_product(features, direction_weight, first, end, memory)
                f, logits_first = logits, 0
                if head_weight is not None:
                    f, logits_first = library_product(features, head_weight, first, end, head_memory), first
                self.sweep(
                    None, f, None, head_bias, targets, None, direction_bias, tangent, into,
                    first, end, logits_first, n, *self.counts, *self.strides,
                )  # fmt: skip
        if self.shares > 1:
            self.merge(into, out, n, self.shares)
        return out


_PLANS: Plans[_Plan] = Plans()
_MERGED_ROWS = 32


@on_device
def per_example_dot(
    features: Tensor,
    logits: Tensor | None,
    head_weight: Tensor | None,
    head_bias: Tensor | None,
    targets: Tensor,
    direction_weight: Tensor,
    direction_bias: Tensor | None,
    loss: int,
) -> Tensor:
    """See :func:`fastmeta.ops.per_example_dot`. ``[N]``."""
    arguments = (features, logits, head_weight, head_bias, targets, direction_weight, direction_bias)
    key = (features.device, loss, precision(features.dtype), *layout(*arguments))
    plan = _PLANS.get(key)
    if plan is None:
        plan = _PLANS.keep(key, _Plan(*arguments, loss))
    elif INTERPRETED:
        checks.targets(targets, features, plan.sizes[1])  # classes in range: on the CPU this costs no wait
    return plan(*arguments)
