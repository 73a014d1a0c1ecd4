"""``out = total + factor matrix``: copies of matrices that no product can read, sums kept in float32, zeros."""

import triton
import triton.language as tl

from fastmeta.triton_kernels._program import Launch, Matrix, Number, Ref, launch

_BLOCK = 1024  # entries of a program


@triton.jit
def affine(
    total_ptr, matrix_ptr, out_ptr, size, columns, constant, factor, matrix_row, matrix_column, out_row,
    block: tl.constexpr,
):  # fmt: skip
    """``total [rows, columns]`` or a constant, and a strided matrix or none; rounded once."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < size
    total = tl.full((block,), 0.0, tl.float32) + constant
    if total_ptr is not None:
        total = tl.load(total_ptr + at, inside, 0.0)
    if matrix_ptr is not None:
        place = at // columns * matrix_row + at % columns * matrix_column
        total += factor * tl.load(matrix_ptr + place, inside, 0.0).to(tl.float32)
    to = at // columns * out_row + at % columns
    tl.store(out_ptr + to, total.to(out_ptr.dtype.element_ty), inside)


def affine_step(
    out: Ref,
    shape: tuple[int, int],
    *,
    total: Ref | None = None,
    constant: float = 0.0,
    matrix: Matrix | None = None,
    factor: float | Number = 1.0,
    pitch: int | None = None,
) -> list[Launch]:
    """The launch that writes ``out``, contiguous or with rows at a pitch; none if it is empty."""
    size = shape[0] * shape[1]
    if size == 0:
        return []
    at, strides = (None, (0, 0)) if matrix is None else (matrix.at, matrix.strides)
    arguments = (total, at, out, size, shape[1], constant, factor, *strides, pitch or shape[1])
    return [launch(affine, (triton.cdiv(size, _BLOCK),), arguments, {"block": _BLOCK})]
