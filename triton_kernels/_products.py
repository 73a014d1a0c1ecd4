"""Tiles of ``h W^T``: the products inside a kernel, and the tiles they come in."""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastmeta.triton_kernels import _forms


class ProductTile(NamedTuple):
    """Rows, classes and features of one step of a product, and the program that makes it."""

    rows: int
    classes: int
    features: int
    warps: int
    stages: int


class RowTile(NamedTuple):
    """Rows and classes of a program that multiplies nothing."""

    rows: int
    classes: int
    warps: int


# Few rows and all classes of a row, for the fused form.
FUSED_TILES = {
    "half": (
        ProductTile(16, 16, 128, 4, 3),
        ProductTile(16, 32, 128, 4, 3),
        ProductTile(16, 64, 128, 4, 3),
        ProductTile(16, 128, 64, 4, 3),
        ProductTile(16, 256, 64, 8, 2),
        ProductTile(16, 512, 32, 8, 2),
    ),
    "tf32": (
        ProductTile(16, 16, 64, 4, 3),
        ProductTile(16, 32, 64, 4, 3),
        ProductTile(16, 64, 64, 4, 3),
        ProductTile(16, 128, 32, 8, 3),
        ProductTile(16, 256, 32, 8, 2),
        ProductTile(16, 512, 16, 8, 2),
    ),
    "scalar": (
        ProductTile(16, 16, 32, 4, 2),
        ProductTile(16, 32, 32, 4, 2),
        ProductTile(16, 64, 16, 4, 2),
        ProductTile(16, 128, 16, 4, 2),
        ProductTile(16, 256, 16, 8, 2),
    ),
}
# Tiles of classes for the flash form; the first is the one for many rows. With a head it takes both accumulators of
# 128 x 128, 128 registers of a thread, beside three stages of the operands in 144 KB: only sm_90, whose products read
# both operands from shared memory, compiles that without spilling. The others have the second, and sm_80 always.
FLASH_TILES = {
    "half": (
        ProductTile(128, 128, 64, 8, 3),
        ProductTile(128, 64, 64, 8, 3),
        ProductTile(64, 128, 64, 8, 3),
        ProductTile(16, 128, 64, 8, 3),
    ),
    "tf32": (
        ProductTile(128, 128, 32, 8, 3),
        ProductTile(128, 64, 32, 8, 3),
        ProductTile(64, 128, 32, 8, 3),
        ProductTile(16, 128, 32, 8, 3),
    ),
    "scalar": (ProductTile(32, 64, 16, 8, 2), ProductTile(32, 32, 16, 4, 2), ProductTile(16, 64, 16, 4, 2)),
}
# A row kernel holds whole rows up to the last of these, and sweeps over longer ones in tiles of that.
ROW_TILES = tuple(
    RowTile(max(1, 1024 // classes), classes, min(max(classes // 256, 4), 16))
    for classes in (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
)


@triton.jit
def logits_and_tangent(
    features_ptr, head_ptr, direction_ptr,  # [N, D]; [C, D] or None each
    row, column,  # [rows], [classes]: int64, within the tensors
    num_features,
    features_row, features_column, head_row, head_column, direction_row, direction_column,
    rows: tl.constexpr, classes: tl.constexpr, features: tl.constexpr, even: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """``h W^T`` and ``h V^T`` of a tile from one read of ``h``; 0 where W or V is None. ``[rows, classes]`` each."""
    depth = tl.arange(0, features).to(tl.int64)
    h_ptr = features_ptr + row[:, None] * features_row + depth[None] * features_column
    if head_ptr is not None:
        w_ptr = head_ptr + column[:, None] * head_row + depth[None] * head_column
    if direction_ptr is not None:
        v_ptr = direction_ptr + column[:, None] * direction_row + depth[None] * direction_column
    f = tl.zeros((rows, classes), tl.float32)
    z = tl.zeros((rows, classes), tl.float32)
    for start in range(0, num_features, features):
        if even:
            h = tl.load(h_ptr)
        else:
            inside = depth[None] < num_features - start
            h = tl.load(h_ptr, inside, 0.0)
        h_ptr += features * features_column
        if head_ptr is not None:
            w = tl.load(w_ptr) if even else tl.load(w_ptr, inside, 0.0)
            w_ptr += features * head_column
            f = tl.dot(h, tl.trans(w), f, input_precision=precision)
        if direction_ptr is not None:
            v = tl.load(v_ptr) if even else tl.load(v_ptr, inside, 0.0)
            v_ptr += features * direction_column
            z = tl.dot(h, tl.trans(v), z, input_precision=precision)
    return f, z


@triton.jit
def times(stride, multiple: tl.constexpr):
    """A stride that came divided by :func:`multiple`."""
    if multiple == 1:
        return stride
    else:
        return stride * tl.full((), multiple, tl.int64)


@triton.jit
def columns(x, part: tl.constexpr, parts: tl.constexpr):
    """One of 1, 2 or 4 equal parts of the columns of a tile, which a thread has in its registers."""
    if parts == 1:
        return x
    else:
        halves = tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        if part < parts // 2:
            return columns(left, part, parts // 2)
        else:
            return columns(right, part - parts // 2, parts // 2)


def parts(tile: ProductTile, products: int) -> int:
    """In how many parts of its columns a tile goes through the row function, for a thread's registers to hold it."""
    entries = products * tile.rows * tile.classes // (32 * tile.warps)
    return 4 if entries >= 64 else 2 if entries >= 32 else 1


def registers(warps: int) -> int:
    """All that a thread can have. Left to itself the assembler spills a few bytes to fit one more program."""
    return min(255, 65536 // (32 * warps))


def arithmetic(dtype: torch.dtype, precision: str, operands_aligned: bool) -> str:
    """Which tiles serve: ``half``, ``tf32``, or ``scalar`` for float32 products and for operands that are not aligned.

    Without tensor cores, or without copies of 16 bytes, operands pass through registers.
    """
    if not operands_aligned or (dtype == torch.float32 and precision == "ieee"):
        return "scalar"
    return "tf32" if dtype == torch.float32 else "half"


def fused_tiles(
    num_classes: int, dtype: torch.dtype, precision: str, operands_aligned: bool
) -> tuple[ProductTile, ...]:
    """The smallest tile that holds all classes; none where there are too many."""
    table = FUSED_TILES[arithmetic(dtype, precision, operands_aligned)]
    return tuple(tile for tile in table if tile.classes >= num_classes)[:1]


def offered(fused: tuple[ProductTile, ...], operands_aligned: bool) -> tuple[str, ...]:
    """Forms of an operator at a shape; large products of unaligned operands are left to the library, unless forced."""
    forms = ("rows", "fused") if fused else ("rows",)
    return (*forms, "flash") if operands_aligned or _forms.forced() else forms


def flash_tiles(
    dtype: torch.dtype, precision: str, products: int, operands_aligned: bool = True
) -> tuple[ProductTile, ...]:
    """Tiles that sweep over any number of classes with so many accumulators."""
    kind, chip = arithmetic(dtype, precision, operands_aligned), _forms.chip()
    if kind == "scalar" or chip == _forms.CHIPS[100]:
        wide = products == 1
    else:
        wide = chip == _forms.CHIPS[90]
    return FLASH_TILES[kind] if wide else FLASH_TILES[kind][1:]


def product_tile(rows: int, table: tuple[ProductTile, ...]) -> ProductTile:
    """The one with the fewest rows that hold all of them, or the first."""
    return min((tile for tile in table if tile.rows >= rows), key=lambda tile: tile.rows, default=table[0])


def row_tile(num_classes: int, table: tuple[RowTile, ...]) -> RowTile:
    """The smallest tile that holds a row, or the largest there is."""
    return next((tile for tile in table if tile.classes >= num_classes), table[-1])


def splits(row_blocks: int, class_tiles: int) -> int:
    """Programs that share the classes of a block of rows: as many as fill the processors most evenly.

    The time is that of the longest program times the waves of programs; one more split has to save 2% of it.
    """
    processors = _forms.chip().processors
    best, least = 1, float("inf")
    for count in range(1, min(class_tiles, 32) + 1):
        steps = -(-class_tiles // count) * -(-row_blocks * count // processors)
        if steps < 0.98 * least:
            best, least = count, float(steps)
    return best


def multiple(*sizes: int) -> int:
    """The largest power of two, up to 8, that divides all sizes.

    Triton sees that a stride is a multiple of 16 and of no smaller number. A kernel that is given the stride divided by
    this, and multiplies by it, reads vectors of so many entries.
    """
    return math.gcd(8, *sizes)


def aligned(num_features: int, *matrices: torch.Tensor | None) -> bool:
    """Whether the features of each matrix can be copied 16 bytes at a time."""
    for matrix in matrices:
        if matrix is not None:
            entries = 16 // matrix.dtype.itemsize
            if matrix.stride(1) != 1 or matrix.stride(0) % entries or matrix.data_ptr() % 16 or num_features % entries:
                return False
    return True


def strides(matrix: torch.Tensor | None) -> tuple[int, int]:
    """Of a matrix that may be left out."""
    return (0, 0) if matrix is None else (matrix.stride(0), matrix.stride(1))


def step(vector: torch.Tensor | None) -> int:
    """The stride of a vector that may be left out."""
    return 0 if vector is None else vector.stride(0)


def scratch(rows: int, of: int, columns: int, like: torch.Tensor) -> torch.Tensor | None:
    """Memory for the products of slabs of so many rows; None where one slab holds them all."""
    return None if rows >= of else torch.empty((rows, columns), dtype=like.dtype, device=like.device)


def library_product(
    features: torch.Tensor, weight: torch.Tensor, first: int, end: int, memory: torch.Tensor | None
) -> torch.Tensor:
    """``h W^T`` of rows first to end. ``[end - first, C]``, contiguous."""
    if memory is None:
        return torch.nn.functional.linear(features, weight)
    return torch.mm(features[first:end], weight.t(), out=memory[: end - first])
