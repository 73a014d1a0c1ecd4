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
    flash_tiles,
    fused_tiles,
    library_product,
    parts,
    product_tile,
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


def _products(tile: ProductTile, d: int, arithmetic: str) -> dict[str, int | bool | str]:
    return {"block_features": tile.features, "even": d % tile.features == 0, "precision": arithmetic}


def _blocks(tile: RowTile | ProductTile) -> dict[str, int]:
    return {"block_rows": tile.rows, "block_classes": tile.classes}


def _strides(logits: Tensor | None, head_weight: Tensor | None, head_bias: Tensor | None) -> tuple[int, ...]:
    return (*strides(logits), *strides(head_weight), step(head_bias))


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
        steps = (*((c, 1) if head else strides(logits)), step(head_bias), step(direction_bias))
        if self.whole:
            tile = _tuning.tile("label_gradient rows", features.dtype, (c,), table, row_tile(c, table))
            unused = {"block_features": 0, "even": True, "precision": "ieee"}
            constants = {"loss": loss, **_blocks(tile), **unused}
            self.strides = (0, 0, *steps[:2], 0, 0, steps[2], 0, 0, steps[3])
            self.launch = Launch(
                whole_rows, (triton.cdiv(self.slab, tile.rows),), constants, num_warps=tile.warps, num_stages=1
            )
        else:
            self.strides = steps
            constants = {"loss": loss, "block_classes": _SWEPT.classes}
            self.launch = Launch(two_sweeps, (self.slab,), constants, num_warps=_SWEPT.warps, num_stages=1)

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
        n, d, c = self.sizes
        out = library_product(features, direction_weight, 0, n, None)
        memory = None if head_weight is None else scratch(self.slab, n, c, features)
        for first in range(0, n, self.slab):
            end = min(first + self.slab, n)
            f, logits_first = logits, 0
            if head_weight is not None:
                f, logits_first = library_product(features, head_weight, first, end, memory), first
            if self.whole:
                self.launch(
                    None, f, None, head_bias, None, direction_bias, out, first, end, logits_first, d, c, scale,
                    *self.strides,
                )  # fmt: skip
            else:
                self.launch(
                    f, head_bias, direction_bias, out, first, end, logits_first, c, scale, *self.strides
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
        n, d, _ = self.sizes = sizes
        self.softmax = _has_softmax(loss)
        arithmetic = precision(features.dtype)
        tile = _tuning.tile("label_gradient fused", features.dtype, sizes, table, product_tile(n, table))
        constants = {"loss": loss, **_blocks(tile), **_products(tile, d, arithmetic)}
        self.launch = Launch(
            whole_rows, (triton.cdiv(n, tile.rows),), constants, num_warps=tile.warps, num_stages=tile.stages
        )
        self.strides = (
            *strides(features),
            *_strides(logits, head_weight, head_bias),
            *strides(direction_weight),
            step(direction_bias),
        )

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
        n, d, c = self.sizes
        out = torch.empty((n, c), dtype=features.dtype, device=features.device)
        if not self.softmax:
            logits = head_weight = head_bias = None
        self.launch(
            features, logits, head_weight, head_bias, direction_weight, direction_bias, out, 0, n, 0, d, c, scale,
            *self.strides,
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
    ) -> None:
        n, d, c = self.sizes = sizes
        dtype, products = features.dtype, 1 if head_weight is None else 2
        arithmetic = precision(dtype)
        table = flash_tiles(dtype, arithmetic, products)
        tile = _tuning.tile("label_gradient flash", dtype, sizes, table, product_tile(n, table))
        row_blocks, class_tiles = triton.cdiv(n, tile.rows), triton.cdiv(c, tile.classes)
        self.tiles = triton.cdiv(class_tiles, splits(row_blocks, class_tiles))
        self.shares = triton.cdiv(class_tiles, self.tiles)
        constants = {
            "loss": loss,
            **_blocks(tile),
            "parts": parts(tile, products),
            **_products(tile, d, arithmetic),
        }
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        self.sum = Launch(flash_sums, (row_blocks, self.shares), constants, **options)
        # p takes the logits, which a head makes again.
        self.again = loss == MSE_PROBS.value
        shares = {"loss": loss, "block_shares": triton.next_power_of_2(self.shares)}
        if self.again and head_weight is not None:
            constants = {**shares, **_blocks(tile), "parts": parts(tile, 1), **_products(tile, d, arithmetic)}
            grid = row_blocks, class_tiles
        else:
            unused = {"parts": 1, "block_features": 0, "even": True, "precision": "ieee"}
            constants = {**shares, **_blocks(_FINISHED), **unused}
            grid = triton.cdiv(n, _FINISHED.rows), triton.cdiv(c, _FINISHED.classes)
            options = {"num_warps": _FINISHED.warps, "num_stages": 1}
        self.finish = Launch(flash_finish, grid, constants, **options)
        self.strides = (
            *strides(features),
            *_strides(logits, head_weight, head_bias),
            *strides(direction_weight),
            step(direction_bias),
        )

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
        n, d, c = self.sizes
        out = torch.empty((n, c), dtype=features.dtype, device=features.device)
        sums = torch.empty((self.shares, 3, n), dtype=torch.float32, device=features.device)
        self.sum(
            features, logits, head_weight, head_bias, direction_weight, direction_bias, out, sums, n, d, c,
            self.tiles, *self.strides,
        )  # fmt: skip
        if not self.again:
            logits = head_weight = head_bias = None
        self.finish(features, logits, head_weight, head_bias, out, sums, n, d, c, self.shares, scale, *self.strides[:7])
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
    fused = fused_tiles(c, dtype, arithmetic)
    offered = _forms.FORMS if fused else ("rows", "flash")
    form = _forms.choose("label_gradient", n, d, c, dtype, head, precision=arithmetic, offered=offered)
    given = features, logits, head_weight, head_bias
    if form == "fused":
        return _Fused(*given, direction_weight, direction_bias, sizes, loss, fused)
    if not _has_softmax(loss):
        return _Product(loss)
    if form == "rows":
        return _Rows(*given, direction_bias, sizes, loss)
    return _Flash(*given, direction_weight, direction_bias, sizes, loss)


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
    return plan(*arguments, scale)
