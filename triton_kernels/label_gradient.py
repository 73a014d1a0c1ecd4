"""``scale t(z_i)`` with ``z = h V^T + b``, in place of ``z`` wherever it has been written.

``rows``   the library writes ``z`` into the result and a row kernel overwrites it: rows that fit a tile in one read,
           longer ones in two sweeps of one program, the second of which finds them in the L2 cache.
``fused``  one launch: the product of a block of rows with all classes, then the row function.
``flash``  two: a sweep over tiles of classes leaves ``z`` in the result and ``sum e``, ``sum e z`` of every row, with
           ``e = exp(f - max f)``; the second finishes it, and makes the logits again where that takes ``p`` and there
           is a head.

The label gradient of binary cross-entropy and of ``mse`` is a product and nothing else, whatever the logits.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from fastmeta.triton_kernels import _arguments, _forms, _tuning
from fastmeta.triton_kernels._label_gradient_kernels import flash_finish, flash_sums, two_sweeps, whole_rows
from fastmeta.triton_kernels._launch import Launch, Plans, layout, on_device, precision
from fastmeta.triton_kernels._products import (
    ROW_TILES,
    ProductTile,
    RowTile,
    aligned,
    flash_tiles,
    fused_tiles,
    library_product,
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
)
from fastmeta.triton_kernels._rows import CROSS_ENTROPY, MSE, MSE_PROBS

_SWEPT = RowTile(1, 4096, 16)  # of a row that no tile holds
_FINISHED = RowTile(8, 512, 8)  # of the flash form's second launch where it multiplies nothing

# (features, logits, head_weight, head_bias, direction_weight, direction_bias, scale) -> [N, C]
_Plan = Callable[..., Tensor]


class _Layout:
    """Counts and strides as the kernels take them, divided by what they are multiples of."""

    def __init__(
        self,
        sizes: tuple[int, int, int],
        logits_strides: tuple[int, int],
        head_bias: Tensor | None,
        direction_bias: Tensor | None,
        features: Tensor | None = None,
        head_weight: Tensor | None = None,
        direction_weight: Tensor | None = None,
    ) -> None:
        _, d, c = sizes
        classes = self.class_multiple = multiple(c, logits_strides[0])
        features_row, features_column = strides(features)
        head_row, head_column = strides(head_weight)
        direction_row, direction_column = strides(direction_weight)
        depth = self.feature_multiple = 1 if features is None else multiple(d, features_row, head_row, direction_row)
        self.counts = d // depth, c // classes
        self.logits = (logits_strides[0] // classes, logits_strides[1])
        self.strides = (
            *(features_row // depth, features_column, *self.logits, head_row // depth, head_column, step(head_bias)),
            *(direction_row // depth, direction_column, step(direction_bias)),
        )
        self._depth = d

    def constants(self, tile: RowTile | ProductTile, arithmetic: str, products: int = 0) -> dict[str, Any]:
        """Of a kernel that makes so many products."""
        step_features = tile.features if isinstance(tile, ProductTile) and products else 0
        return {
            "block_rows": tile.rows,
            "block_classes": tile.classes,
            "parts": parts(tile, products) if isinstance(tile, ProductTile) and products else 1,
            "block_features": step_features,
            "even": step_features == 0 or self._depth % step_features == 0,
            "precision": arithmetic,
            "class_multiple": self.class_multiple,
            "feature_multiple": self.feature_multiple,
        }


class _Product:
    """The losses without a softmax: ``factor scale (h V^T + b)``."""

    def __init__(self, loss: int) -> None:
        self.factor = 2.0 if loss == MSE.value else 1.0

    def __call__(
        self,
        features: Tensor,
        logits: Tensor | None,
        head_weight: Tensor | None,
        head_bias: Tensor | None,
        direction_weight: Tensor,
        direction_bias: Tensor | None,
        scale: float,
    ) -> Tensor:
        factor = self.factor * scale
        if direction_bias is not None:
            return torch.addmm(direction_bias, features, direction_weight.t(), beta=factor, alpha=factor)
        shape = features.shape[0], direction_weight.shape[0]
        out = torch.empty(shape, dtype=features.dtype, device=features.device)
        return torch.addmm(out, features, direction_weight.t(), beta=0, alpha=factor, out=out)


class _Rows:
    """The library's product in slabs of rows, and a row kernel over each."""

    def __init__(
        self,
        features: Tensor,
        logits: Tensor | None,
        head_weight: Tensor | None,
        head_bias: Tensor | None,
        direction_bias: Tensor | None,
        sizes: tuple[int, int, int],
        loss: int,
    ) -> None:
        n, _, c = self.sizes = sizes
        head = head_weight is not None
        # The product needs no scratch: it goes into the result.
        self.slab = _forms.slab_rows(n, c * features.dtype.itemsize) if head else n
        table = tuple(tile for tile in ROW_TILES if tile.classes >= c)
        self.whole = len(table) > 0
        self.layout = _Layout(sizes, (c, 1) if head else strides(logits), head_bias, direction_bias)
        if self.whole:
            tile = _tuning.tile("label_gradient rows", features.dtype, (c,), table, row_tile(c, table))
            grid, constants = triton.cdiv(self.slab, tile.rows), self.layout.constants(tile, "ieee")
            del constants["parts"]
            options = {"num_warps": tile.warps, "num_stages": 1, "max_registers": registers(tile.warps)}
            self.launch = Launch(whole_rows, (grid,), {"loss": loss, **constants}, **options)
            self.strides: tuple[int, ...] = self.layout.strides
        else:
            constants = {"block_classes": _SWEPT.classes, "class_multiple": self.layout.class_multiple}
            self.launch = Launch(
                two_sweeps, (self.slab,), {"loss": loss, **constants}, num_warps=_SWEPT.warps, num_stages=1
            )
            self.strides = (*self.layout.logits, step(head_bias), step(direction_bias))

    def __call__(
        self,
        features: Tensor,
        logits: Tensor | None,
        head_weight: Tensor | None,
        head_bias: Tensor | None,
        direction_weight: Tensor,
        direction_bias: Tensor | None,
        scale: float,
    ) -> Tensor:
        n, _, c = self.sizes
        out = library_product(features, direction_weight, 0, n, None)
        memory = None if head_weight is None else scratch(self.slab, n, c, features)
        for first in range(0, n, self.slab):
            end = min(first + self.slab, n)
            f, logits_first = logits, 0
            if head_weight is not None:
                f, logits_first = library_product(features, head_weight, first, end, memory), first
            if self.whole:
                self.launch(
                    None, f, None, head_bias, None, direction_bias, out, first, end, logits_first,
                    *self.layout.counts, scale, *self.strides,
                )  # fmt: skip
            else:
                self.launch(
                    f, head_bias, direction_bias, out, first, end, logits_first, self.layout.counts[1], scale,
                    *self.strides,
                )  # fmt: skip
        return out


class _Fused:
    """One launch for a block of rows and all classes."""

    def __init__(
        self,
        features: Tensor,
        logits: Tensor | None,
        head_weight: Tensor | None,
        head_bias: Tensor | None,
        direction_weight: Tensor,
        direction_bias: Tensor | None,
        sizes: tuple[int, int, int],
        loss: int,
        table: tuple[ProductTile, ...],
    ) -> None:
        n, _, c = sizes
        self.shape = n, c
        self.softmax = _has_softmax(loss)
        tile = _tuning.tile("label_gradient fused", features.dtype, sizes, table, product_tile(n, table))
        biases = head_bias, direction_bias
        self.layout = _Layout(sizes, strides(logits), *biases, features, head_weight, direction_weight)
        constants = self.layout.constants(tile, precision(features.dtype), 1)
        del constants["parts"]
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        self.launch = Launch(whole_rows, (triton.cdiv(n, tile.rows),), {"loss": loss, **constants}, **options)

    def __call__(
        self,
        features: Tensor,
        logits: Tensor | None,
        head_weight: Tensor | None,
        head_bias: Tensor | None,
        direction_weight: Tensor,
        direction_bias: Tensor | None,
        scale: float,
    ) -> Tensor:
        out = torch.empty(self.shape, dtype=features.dtype, device=features.device)
        if not self.softmax:
            logits = head_weight = head_bias = None
        self.launch(
            features, logits, head_weight, head_bias, direction_weight, direction_bias, out, 0, self.shape[0], 0,
            *self.layout.counts, scale, *self.layout.strides,
        )  # fmt: skip
        return out


class _Flash:
    """A sweep over tiles of classes for the sums of the rows, then the result."""

    def __init__(
        self,
        features: Tensor,
        logits: Tensor | None,
        head_weight: Tensor | None,
        head_bias: Tensor | None,
        direction_weight: Tensor,
        direction_bias: Tensor | None,
        sizes: tuple[int, int, int],
        loss: int,
        table: tuple[ProductTile, ...],
    ) -> None:
        n, _, c = sizes
        self.shape = n, c
        dtype, products = features.dtype, 1 if head_weight is None else 2
        arithmetic = precision(dtype)
        tile = _tuning.tile("label_gradient flash", dtype, sizes, table, product_tile(n, table))
        biases = head_bias, direction_bias
        self.layout = _Layout(sizes, strides(logits), *biases, features, head_weight, direction_weight)
        row_blocks, class_tiles = triton.cdiv(n, tile.rows), triton.cdiv(c, tile.classes)
        self.tiles = triton.cdiv(class_tiles, splits(row_blocks, class_tiles))
        self.shares = triton.cdiv(class_tiles, self.tiles)
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        constants = {"loss": loss, **self.layout.constants(tile, arithmetic, products)}
        self.sum = Launch(flash_sums, (row_blocks, self.shares), constants, **options)
        # p takes the logits, which a head makes again.
        self.again = loss == MSE_PROBS.value
        constants = {"loss": loss, "block_shares": triton.next_power_of_2(self.shares)}
        if self.again and head_weight is not None:
            grid = row_blocks, class_tiles
            constants |= self.layout.constants(tile, arithmetic, 1)
        else:
            grid = triton.cdiv(n, _FINISHED.rows), triton.cdiv(c, _FINISHED.classes)
            constants |= self.layout.constants(_FINISHED, "ieee")
            options = {"num_warps": _FINISHED.warps, "num_stages": 1}
        self.finish = Launch(flash_finish, grid, constants, **options)

    def __call__(
        self,
        features: Tensor,
        logits: Tensor | None,
        head_weight: Tensor | None,
        head_bias: Tensor | None,
        direction_weight: Tensor,
        direction_bias: Tensor | None,
        scale: float,
    ) -> Tensor:
        n, _ = self.shape
        out = torch.empty(self.shape, dtype=features.dtype, device=features.device)
        sums = torch.empty((self.shares, 3, n), dtype=torch.float32, device=features.device)
        self.sum(
            features, logits, head_weight, head_bias, direction_weight, direction_bias, out, sums, n,
            *self.layout.counts, self.tiles, *self.layout.strides,
        )  # fmt: skip
        if not self.again:
            logits = head_weight = head_bias = None
        self.finish(
            features, logits, head_weight, head_bias, out, sums, n, *self.layout.counts, self.shares, scale,
            *self.layout.strides[:7],
        )  # fmt: skip
        return out


def _has_softmax(loss: int) -> bool:
    return loss in (CROSS_ENTROPY.value, MSE_PROBS.value)


def _plan(
    features: Tensor,
    logits: Tensor | None,
    head_weight: Tensor | None,
    head_bias: Tensor | None,
    direction_weight: Tensor,
    direction_bias: Tensor | None,
    loss: int,
) -> _Plan:
    _arguments.loss(loss)
    n, d, c = sizes = _arguments.outputs(features, logits, head_weight, head_bias)
    _arguments.direction(features, c, direction_weight, direction_bias)
    dtype, arithmetic, device = features.dtype, precision(features.dtype), features.device
    if n == 0 or c == 0:
        return lambda *rest: torch.empty((n, c), dtype=dtype, device=device)
    head = head_weight is not None and _has_softmax(loss)
    operands = features, head_weight if head else None, direction_weight
    operands_aligned = aligned(d, *operands)
    fused = fused_tiles(c, dtype, arithmetic, operands_aligned)
    forms = offered(fused, operands_aligned)
    form = _forms.choose("label_gradient", n, d, c, dtype, head, precision=arithmetic, offered=forms)
    given = features, logits, head_weight, head_bias
    if form == "fused":
        return _Fused(*given, direction_weight, direction_bias, sizes, loss, fused)
    if not _has_softmax(loss):
        return _Product(loss)
    if form == "rows":
        return _Rows(*given, direction_bias, sizes, loss)
    table = flash_tiles(dtype, arithmetic, 1 + head, operands_aligned)
    return _Flash(*given, direction_weight, direction_bias, sizes, loss, table)


_PLANS: Plans[_Plan] = Plans()


@on_device
def label_gradient(
    features: Tensor,
    logits: Tensor | None,
    head_weight: Tensor | None,
    head_bias: Tensor | None,
    direction_weight: Tensor,
    direction_bias: Tensor | None,
    loss: int,
    scale: float,
) -> Tensor:
    """See :func:`fastmeta.ops.label_gradient`. ``[N, C]``."""
    arguments = (features, logits, head_weight, head_bias, direction_weight, direction_bias)
    key = (features.device, loss, precision(features.dtype), *layout(*arguments))
    plan = _PLANS.get(key)
    if plan is None:
        plan = _PLANS.keep(key, _plan(*arguments, loss))
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    return plan(*arguments, float(scale))
