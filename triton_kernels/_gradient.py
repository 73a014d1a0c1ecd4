"""``R^T h + damping V`` and ``sum_i R_i + damping b``, where R is ``w r`` or ``w c(z)``: the sums over N, in each form.

``fused``  R by one kernel, then :mod:`._transposed_product`: two launches and no library product.
``rows``   The product (logits of a head, or z) by the library; R over it by one row kernel, with the sums of its
           columns in float32; R^T h by the library. Rows that no program can hold have their statistics taken first.
           In slabs of rows once the scratch would pass the limit.
``flash``  The rows' statistics by a sweep that makes the product tile by tile, then R and R^T h slab by slab of
           classes: the least memory.

Why a large head goes by slabs and library products, and not in one kernel that adds its tiles of R^T h to memory: each
of N / 128 blocks of rows would read and write all of the result in float32, ``N / 128 x C x D x 8`` bytes, 135 GB or
28 ms of an H200's memory at (8192, 2048, 128256), where the three products of the sweep, of R's tiles and of R^T h are
12.9 Tflop or 16 ms. A kernel whose programs own ``[classes, features]`` and loop over N would make every tile of the
product once for each of its D / 128 blocks of features, 16 times at D = 2048.

A slab of rows adds its part to a result that is read and written again, ``12 C D`` bytes with a sum in float32 beside
``4 n C D`` operations: as much time at some 500 rows. So a slab is never smaller than four times the result, and 16-bit
results of several slabs, whose sum takes ``6 C D`` bytes, are made in one as long as that takes no more. The scratch
is then at most the larger of :func:`._forms.slab_limit` and four times the result, and three times the result for the
sum. ``flash`` costs half as many operations again (``6 N C D``), and takes :data:`FLASH_BYTES` and the rows' sums.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastmeta.triton_kernels import _forms, _products, _tuning
from fastmeta.triton_kernels._launch import Launch, precision
from fastmeta.triton_kernels._products import step, strides
from fastmeta.triton_kernels._statistics import Sweep, pair, rows_of_statistics, rows_tile
from fastmeta.triton_kernels._transposed_product import SumOfParts, TransposedProduct
from fastmeta.triton_kernels._weighted_rows import (
    MOST_CLASSES,
    block_of,
    pitch_of,
    product_rows,
    whole_rows,
    whole_tile,
)

FLASH_BYTES = 64 << 20  # of a slab of classes
_MOST_PROGRAMS = 512  # of the row kernel: each leaves one row of partial sums
_ENOUGH_PROGRAMS = 512


class Problem(NamedTuple):
    """What a plan is made for."""

    operator: str
    n: int
    d: int
    c: int
    dtype: torch.dtype
    loss: int
    curved: bool  # the curvature of a tangent, not the residual
    classes: bool  # targets are classes
    product: bool  # the product is made from the features, not given
    with_bias: bool


class Operands(NamedTuple):
    """The tensors of a call."""

    features: Tensor  # [N, D]
    product: Tensor | None  # [N, C], or made of features and
    factor: Tensor | None  # [C, D]
    bias: Tensor | None  # [C], of the product
    other: Tensor  # [N, C], or classes [N]
    weights: Tensor | None  # [N]


class Fused:
    """Two launches: R, and its product with the features."""

    def __init__(self, p: Problem) -> None:
        arithmetic = precision(p.dtype)
        self.pitch = pitch_of(p.c)
        row_function = {"loss": p.loss, "curved": p.curved, "classes": p.classes}
        if p.product:
            table = _products.fused_tiles(p.c, p.dtype, arithmetic)
            tile = _tuning.tile("product_rows", p.dtype, (p.n, p.d, p.c), table, table[0])
            constants = row_function | {"even": p.d % tile.features == 0, "precision": arithmetic}
            constants |= {"block_rows": tile.rows, "block_classes": tile.classes, "block_features": tile.features}
            self.rows = Launch(
                product_rows, (triton.cdiv(p.n, tile.rows),), constants, num_warps=tile.warps, num_stages=tile.stages
            )
        else:
            self.rows = _whole_rows(p, p.n)[0]
        self.problem = p
        self.transposed = TransposedProduct(p.n, p.d, p.c, p.dtype, arithmetic, p.with_bias)

    def __call__(self, given: Operands, addend: Tensor | None, damping: float, weight: Tensor, bias: Tensor) -> None:
        """Write ``weight [C, D]`` and ``bias [C]``."""
        p, features = self.problem, given.features
        rows = torch.empty((p.n, self.pitch), dtype=p.dtype, device=features.device)
        operands = *pair(given.other), step(given.weights), self.pitch
        if p.product:
            self.rows(
                features, given.factor, given.bias, given.other, given.weights, rows, p.n, p.d, p.c,
                *features.stride(), *strides(given.factor), step(given.bias), *operands,
            )  # fmt: skip
        else:
            self.rows(
                given.product, given.bias, given.other, given.weights, rows, None, p.n, p.c, 1, 0,
                *strides(given.product), step(given.bias), *operands,
            )  # fmt: skip
        self.transposed(rows, features, addend, given.bias, weight, bias, damping)


class Slabs:
    """Library products over slabs of rows and of classes (``rows``, ``flash``)."""

    def __init__(self, p: Problem, flash: bool) -> None:
        self.problem = p
        self.flash = flash
        n, d, c, bytes_each = p.n, p.d, p.c, p.dtype.itemsize
        arithmetic = precision(p.dtype)
        self.long = p.loss in (0, 3) and (flash or c > MOST_CLASSES)
        statistics = dict(loss=p.loss, curved=p.curved, classes=p.classes)
        if flash:
            self.columns = min(c, max(FLASH_BYTES // (max(n, 1) * bytes_each) // 256 * 256, 1024))
            self.slab = _slab_rows(n, 0, self.columns, p.dtype, FLASH_BYTES)
        elif c > MOST_CLASSES and not p.product:
            # The logits are there: whatever is taken of their rows, it is taken once.
            self.columns = min(c, max(_forms.slab_rows(c, n * bytes_each) // 256 * 256, 1024))
            self.slab = n
        else:
            self.columns = c
            self.slab = _slab_rows(n, d, c, p.dtype, None)
        # Of the sweep: all rows where it is over before the first slab, a slab's own where that holds whole rows.
        self.sweep_first = flash or not p.product
        swept = n if self.sweep_first else self.slab
        self.sweep = Sweep(swept, d, c, p.dtype, arithmetic, product=p.product and flash, **statistics)
        self.pitch = pitch_of(self.columns)
        if self.columns < c or c > MOST_CLASSES or flash:
            tile = rows_tile(self.slab, c, p.dtype)
            across = triton.cdiv(self.columns, tile.classes)
            self.steps, self.parts = _share(triton.cdiv(self.slab, tile.rows), triton.cdiv(_ENOUGH_PROGRAMS, across))
            constants = {**statistics, "block_rows": tile.rows, "block_classes": tile.classes}
            self.rows = Launch(rows_of_statistics, (across, self.parts), constants, num_warps=tile.warps)
            self.whole = False
        else:
            self.rows, self.steps, self.parts = _whole_rows(p, self.slab, _MOST_PROGRAMS)
            self.whole = True
        self.slabs = triton.cdiv(n, self.slab)
        self.sum = SumOfParts(self.parts * self.slabs, 0, c, True) if p.with_bias else None

    def __call__(self, given: Operands, addend: Tensor | None, damping: float, weight: Tensor, bias: Tensor) -> None:
        """Write ``weight [C, D]`` and ``bias [C]``."""
        p, features = self.problem, given.features
        partials = None
        if self.sum is not None:
            shape = self.parts * self.slabs, p.c
            partials = torch.empty(shape, dtype=torch.float32, device=features.device)
        scratch = torch.empty((self.slab, self.pitch), dtype=p.dtype, device=features.device)
        statistics = None
        if self.long and self.sweep_first:
            factor = given.features, given.factor
            statistics = self.sweep(
                p.n, given.product, *(factor if p.product else (None, None)), given.bias, given.other
            )
        for first_class in range(0, p.c, self.columns):
            end_class = min(first_class + self.columns, p.c)
            whole = self.columns == p.c
            into = weight if whole else weight[first_class:end_class]
            plus = addend if whole or addend is None else addend[first_class:end_class]
            total = _Total(into, plus, damping, self.slabs)
            for slab, part in enumerate(self._slabs(given, first_class, end_class)):
                rows = self._rows(part, scratch, statistics, slab, first_class, end_class, partials)
                total.add(rows, part.features)
            total.finish()
        if self.sum is not None:
            self.sum(partials, addend, given.bias, None, bias, damping)

    def _slabs(self, given: Operands, first_class: int, end_class: int) -> Iterator[Operands]:
        """The operands of each slab of rows; the product's and the direction's classes are the slab's alone."""
        p = self.problem
        product, factor, other = given.product, given.factor, given.other
        if self.columns < p.c:
            product = None if product is None else product[:, first_class:end_class]
            factor = None if factor is None else factor[first_class:end_class]
        if self.slabs == 1:
            yield Operands(given.features, product, factor, given.bias, other, given.weights)
            return
        for begin in range(0, p.n, self.slab):
            rows = slice(begin, min(begin + self.slab, p.n))
            yield Operands(
                given.features[rows],
                None if product is None else product[rows],
                factor,
                given.bias,
                other[rows],
                None if given.weights is None else given.weights[rows],
            )

    def _rows(
        self, part: Operands, scratch: Tensor, statistics: Tensor | None, slab: int, first_class: int, end_class: int,
        partials: Tensor | None,
    ) -> Tensor:  # [rows, classes]  # fmt: skip
        p = self.problem
        n = part.features.shape[0]
        rows = scratch[:n, : end_class - first_class]
        product = part.product
        if p.product:
            product = torch.mm(part.features, part.factor.t(), out=rows)  # type: ignore[union-attr]
        tensors = product, part.bias, part.other, part.weights
        steps = *strides(product), step(part.bias), *pair(part.other), step(part.weights), self.pitch
        if self.whole:
            self.rows(*tensors, rows, partials, n, p.c, self.steps, slab * self.parts, *steps)
            return rows
        row_stride = p.n
        if statistics is not None:
            statistics = statistics[:, slab * self.slab :]
        elif self.long:
            statistics, row_stride = self.sweep(n, product, None, None, part.bias, part.other), n
        self.rows(
            *tensors, statistics, rows, partials, n, p.c, first_class, self.steps, slab * self.parts, row_stride, *steps
        )  # fmt: skip
        return rows


class _Total:
    """``sum_k R_k^T h_k + damping V`` by the library: 16-bit results of several slabs in float32 until the last."""

    def __init__(self, out: Tensor, addend: Tensor | None, damping: float, slabs: int) -> None:
        self.out, self.addend, self.damping = out, addend, damping
        self.separate = slabs > 1 and out.dtype != torch.float32
        self.sum: Tensor | None = None

    def add(self, rows: Tensor, features: Tensor) -> None:
        if self.separate:
            product = torch.mm(rows.t(), features)
            if self.sum is None:
                self.sum = product.float()
                if self.addend is not None:
                    self.sum.add_(self.addend, alpha=self.damping)
            else:
                self.sum.add_(product)
        elif self.sum is not None:
            self.sum.addmm_(rows.t(), features)
        else:
            if self.addend is None:
                torch.mm(rows.t(), features, out=self.out)
            else:
                torch.addmm(self.addend, rows.t(), features, beta=self.damping, out=self.out)
            self.sum = self.out

    def finish(self) -> None:
        if self.separate:
            assert self.sum is not None
            self.out.copy_(self.sum)


def _whole_rows(p: Problem, n: int, most: int | None = None) -> tuple[Launch, int, int]:
    """The row kernel, its tiles in a program, and its programs."""
    tile = whole_tile(n, p.c, p.dtype)
    block = block_of(p.c)
    block_rows = max(1, tile.entries // block)
    blocks = triton.cdiv(n, block_rows)
    tiles, programs = _share(blocks, most or blocks)
    constants = {"loss": p.loss, "curved": p.curved, "classes": p.classes}
    constants |= {"block_rows": block_rows, "block_classes": block}
    return Launch(whole_rows, (programs,), constants, num_warps=tile.warps), tiles, programs


def _share(blocks: int, most: int) -> tuple[int, int]:
    """Blocks of a program, and programs, of which there are at most so many."""
    each = triton.cdiv(blocks, min(blocks, most))
    return each, triton.cdiv(blocks, each)


def _slab_rows(n: int, d: int, c: int, dtype: torch.dtype, limit: int | None) -> int:
    """Rows of a slab; see the module's docstring. A multiple of 16, so that every slab is aligned as the first."""
    bytes_per_row = c * dtype.itemsize
    rows = _forms.slab_rows(n, bytes_per_row) if limit is None else max(1, limit // bytes_per_row)
    rows = max(rows // 16 * 16, 16, triton.cdiv(4 * d, 16) * 16)
    spared = 3 * d if dtype.itemsize == 2 else 0
    return n if n <= rows + spared else rows


def plan(p: Problem) -> Fused | Slabs:
    """The form that serves a problem, with its launches; N and C are not 0."""
    arithmetic = precision(p.dtype)
    offered = ["rows", "flash"]
    fits = _products.fused_tiles(p.c, p.dtype, arithmetic) if p.product else p.c <= MOST_CLASSES
    if fits and p.d > 0:
        offered.append("fused")
    head = p.product and not p.curved
    form = _forms.choose(p.operator, p.n, p.d, p.c, p.dtype, head, precision=arithmetic, offered=offered)
    return Fused(p) if form == "fused" else Slabs(p, form == "flash")
