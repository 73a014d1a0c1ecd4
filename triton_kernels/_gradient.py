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
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastmeta.losses import LOSSES
from fastmeta.triton_kernels import _forms, _products, _tuning
from fastmeta.triton_kernels._launch import Launch, precision
from fastmeta.triton_kernels._products import step, strides
from fastmeta.triton_kernels._statistics import MOST_REGISTERS, Sweep, divided, rows_of_statistics, rows_tile
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
WHOLE_ROW_LOSSES = (LOSSES["cross_entropy"], LOSSES["mse_probs"])
_MOST_PROGRAMS = 512  # of the row kernels: those that share classes leave a row of partial sums each
_PARTIAL_BYTES = 16 << 20  # of these rows


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
    multiple: int  # divides C and the rows' strides, see _products.multiple
    aligned: bool  # the features, and the head or direction, see _products.aligned


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
        row_function = _row_function(p)
        if p.product:
            # Eight warps where a row is wide: the row function takes more registers than the product.
            found = _products.fused_tiles(p.c, p.dtype, arithmetic, p.aligned)
            table = tuple(tile._replace(warps=8) if tile.classes >= 128 else tile for tile in found)
            tile = _tuning.tile("product_rows", p.dtype, (p.n, p.d, p.c), table, table[0])
            constants = row_function | {"even": p.d % tile.features == 0, "precision": arithmetic}
            constants |= {"block_rows": tile.rows, "block_classes": tile.classes, "block_features": tile.features}
            self.rows = Launch(
                product_rows,
                (triton.cdiv(p.n, tile.rows),),
                constants,
                num_warps=tile.warps,
                num_stages=tile.stages,
                max_registers=MOST_REGISTERS,
            )
        else:
            self.rows = _whole_rows(p, p.n)[0]
        self.problem = p
        self.transposed = TransposedProduct(p.n, p.d, p.c, p.dtype, arithmetic, p.with_bias)

    def __call__(self, given: Operands, addend: Tensor | None, damping: float, weight: Tensor, bias: Tensor) -> None:
        """Write ``weight [C, D]`` and ``bias [C]``."""
        p, features = self.problem, given.features
        rows = torch.empty((p.n, self.pitch), dtype=torch.float32, device=features.device)
        operands = *divided(given.other, p.multiple), step(given.weights), self.pitch
        if p.product:
            self.rows(
                features, given.factor, given.bias, given.other, given.weights, rows, p.n, p.d, p.c // p.multiple,
                *features.stride(), *strides(given.factor), step(given.bias), *operands,
            )  # fmt: skip
        else:
            self.rows(
                given.product, given.bias, given.other, given.weights, rows, None, p.n, p.c // p.multiple, 1, 0,
                *divided(given.product, p.multiple), step(given.bias), *operands,
            )  # fmt: skip
        self.transposed(rows, features, addend, given.bias, weight, bias, damping)


class Slabs:
    """Library products over slabs of rows and of classes (``rows``, ``flash``)."""

    def __init__(self, p: Problem, flash: bool) -> None:
        self.problem = p
        n, d, c, dtype = p.n, p.d, p.c, p.dtype
        row_function = _row_function(p)
        # Given logits of long rows are swept once, and then go by classes too: nothing is made twice for that.
        by_classes = flash or (c > MOST_CLASSES and not p.product)
        if by_classes:
            limit = FLASH_BYTES if flash else _forms.slab_bytes()
            self.columns = min(c, max(limit // (n * dtype.itemsize) // 256 * 256, 1024))
            self.slab = _slab_rows(n, 0, self.columns, dtype, limit)
        else:
            self.columns = c
            self.slab = _slab_rows(n, d, c, dtype, _forms.slab_bytes())
        self.slabs = triton.cdiv(n, self.slab)
        self.single = self.slabs == 1 and self.columns == c
        self.pitch = pitch_of(self.columns)
        self.whole = c <= MOST_CLASSES and not by_classes
        if self.whole:
            self.rows, self.steps, self.parts = _whole_rows(p, self.slab, _MOST_PROGRAMS)
        else:
            tile = rows_tile(self.slab, c, dtype)
            across = triton.cdiv(self.columns, tile.classes)
            most = max(1, min(triton.cdiv(_MOST_PROGRAMS, across), _PARTIAL_BYTES // (4 * c)))
            self.steps, self.parts = _share(triton.cdiv(self.slab, tile.rows), most)
            constants = {**row_function, "block_rows": tile.rows, "block_classes": tile.classes}
            self.rows = Launch(
                rows_of_statistics, (across, self.parts), constants, num_warps=tile.warps, max_registers=MOST_REGISTERS
            )
        # All rows before the first slab, or those of each slab once its product is there.
        self.first = self.each = None
        if not self.whole and p.loss in WHOLE_ROW_LOSSES:
            arithmetic = precision(dtype)
            if by_classes:
                self.first = Sweep(n, d, c, dtype, arithmetic, product=p.product, aligned=p.aligned, **row_function)
            else:
                self.each = Sweep(self.slab, d, c, dtype, arithmetic, product=False, aligned=True, **row_function)
        self.sum = SumOfParts(self.parts, 0, c, True) if p.with_bias else None

    def __call__(self, given: Operands, addend: Tensor | None, damping: float, weight: Tensor, bias: Tensor) -> None:
        """Write ``weight [C, D]`` and ``bias [C]``."""
        p, features = self.problem, given.features
        scratch = torch.empty((self.slab, self.pitch), dtype=p.dtype, device=features.device)
        partials = None
        if self.sum is not None:
            partials = torch.empty((self.parts, p.c), dtype=torch.float32, device=features.device)
        statistics = None
        if self.first is not None:
            made = (features, given.factor) if p.product else (None, None)
            statistics = self.first(p.n, given.product, *made, given.bias, given.other)
        if self.single:
            rows = scratch if self.pitch == p.c else scratch[:, : p.c]
            self._rows(given, rows, statistics, partials, 0, 0)
            _product(weight, rows, features, addend, damping)
        else:
            for first in range(0, p.c, self.columns):
                of = slice(first, min(first + self.columns, p.c))
                total = _Total(weight[of], None if addend is None else addend[of], damping, self.slabs)
                for slab, part in enumerate(self._slabs(given, of)):
                    rows = scratch[: part.features.shape[0], : of.stop - first]
                    self._rows(part, rows, statistics, partials, slab, first)
                    total.add(rows, part.features)
                total.finish()
        if self.sum is not None:
            self.sum(partials, addend, given.bias, None, bias, damping)

    def _slabs(self, given: Operands, of: slice) -> Iterator[Operands]:
        """The operands of each slab of rows; the product's and the direction's classes are those asked for."""
        product = None if given.product is None else given.product[:, of]
        factor = None if given.factor is None else given.factor[of]
        for begin in range(0, self.problem.n, self.slab):
            rows = slice(begin, begin + self.slab)
            yield Operands(
                given.features[rows],
                None if product is None else product[rows],
                factor,
                given.bias,
                given.other[rows],
                None if given.weights is None else given.weights[rows],
            )

    def _rows(
        self, part: Operands, rows: Tensor, statistics: Tensor | None, partials: Tensor | None, slab: int, first: int
    ) -> None:
        """Write R of one slab of rows, for the classes from ``first`` on."""
        p = self.problem
        n, c = rows.shape[0], p.c // p.multiple
        product = part.product
        if product is None:
            product = torch.mm(part.features, part.factor.t(), out=rows)  # type: ignore[union-attr]
        operands = product, part.bias, part.other, part.weights
        steps = *divided(product, p.multiple), step(part.bias), *divided(part.other, p.multiple), step(part.weights)
        if self.whole:
            self.rows(*operands, rows, partials, n, c, self.steps, slab, *steps, self.pitch)
            return
        if self.each is not None:
            statistics = self.each(n, product, None, None, part.bias, part.other)
        elif statistics is not None:
            statistics = statistics[:, slab * self.slab :]
        row = 0 if statistics is None else statistics.stride(0)
        self.rows(*operands, statistics, rows, partials, n, c, first, self.steps, slab, row, *steps, self.pitch)


class _Total:
    """``sum_k R_k^T h_k + damping V``: 16-bit results of several slabs in float32 until the last."""

    def __init__(self, out: Tensor, addend: Tensor | None, damping: float, slabs: int) -> None:
        self.out, self.addend, self.damping = out, addend, damping
        self.apart = slabs > 1 and out.dtype != torch.float32
        self.sum: Tensor | None = None

    def add(self, rows: Tensor, features: Tensor) -> None:
        if self.sum is None and self.apart:
            self.sum = torch.mm(rows.t(), features).float()
            if self.addend is not None:
                self.sum.add_(self.addend, alpha=self.damping)
        elif self.sum is None:
            self.sum = self.out
            _product(self.out, rows, features, self.addend, self.damping)
        elif self.apart:
            self.sum.add_(torch.mm(rows.t(), features))
        else:
            self.sum.addmm_(rows.t(), features)

    def finish(self) -> None:
        if self.apart:
            assert self.sum is not None
            self.out.copy_(self.sum)


def _product(out: Tensor, rows: Tensor, features: Tensor, addend: Tensor | None, damping: float) -> None:
    if addend is None:
        torch.mm(rows.t(), features, out=out)
    else:
        torch.addmm(addend, rows.t(), features, beta=damping, out=out)


def _row_function(p: Problem) -> dict[str, Any]:
    return {"loss": p.loss, "curved": p.curved, "classes": p.classes, "multiple": p.multiple}


def _whole_rows(p: Problem, n: int, most: int | None = None) -> tuple[Launch, int, int]:
    """The row kernel, its tiles in a program, and its programs."""
    tile = whole_tile(n, p.c, p.dtype)
    block = block_of(p.c)
    block_rows = max(1, tile.entries // block)
    blocks = triton.cdiv(n, block_rows)
    tiles, programs = _share(blocks, most or blocks)
    constants = _row_function(p)
    constants |= {"block_rows": block_rows, "block_classes": block}
    launch = Launch(whole_rows, (programs,), constants, num_warps=tile.warps, max_registers=128)
    return launch, tiles, programs


def _share(blocks: int, most: int) -> tuple[int, int]:
    """Blocks of a program, and programs, of which there are at most so many."""
    each = triton.cdiv(blocks, min(blocks, most))
    return each, triton.cdiv(blocks, each)


def _slab_rows(n: int, d: int, c: int, dtype: torch.dtype, limit: int) -> int:
    """Rows of a slab; see the module's docstring. A multiple of 16, so that every slab is aligned as the first."""
    rows = max(limit // (c * dtype.itemsize) // 16 * 16, triton.cdiv(4 * d, 16) * 16, 16)
    spared = 3 * d if dtype.itemsize == 2 else 0
    return n if n <= rows + spared else rows


def multiple(c: int, *matrices: Tensor | None) -> int:
    """Of C and of the rows' strides of what is read; the product's own memory begins its rows at multiples of 16."""
    return _products.multiple(c, *(m.stride(0) for m in matrices if m is not None and m.dim() == 2))


def plan(p: Problem) -> Fused | Slabs:
    """The form that serves a problem, with its launches; N and C are not 0."""
    arithmetic = precision(p.dtype)
    if p.product:
        fused = _products.fused_tiles(p.c, p.dtype, arithmetic, p.aligned)
        offered = _products.offered(fused if p.d > 0 else (), p.aligned)
    else:
        offered = ("rows", "flash", "fused") if p.c <= MOST_CLASSES and p.d > 0 else ("rows", "flash")
    head = p.product and not p.curved
    form = _forms.choose(p.operator, p.n, p.d, p.c, p.dtype, head, precision=arithmetic, offered=offered)
    return Fused(p) if form == "fused" else Slabs(p, form == "flash")
