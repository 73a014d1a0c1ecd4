"""``scale (h_u h_H^T + 1) r_H`` in two forms.

``rows``   library products alone, in either association order: by way of the Gram matrix ``[Nu, Nh]``, to which the
           bias is added in passing, or by way of ``r^T h``, which sums r in passing. Float16 similarities may overflow.
``fused``  one launch, of 16-bit tensors: a program holds rows of the result and goes over the hold-out examples, whose
           similarities it keeps in float32, so that nothing between the two products is rounded.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from fastmeta import checks
from fastmeta.ops.feature_similarity import gram_is_cheaper
from fastmeta.triton_kernels import _rule
from fastmeta.triton_kernels._affine import affine_step
from fastmeta.triton_kernels._program import (
    Buffer,
    Launch,
    Matrix,
    Number,
    Product,
    Program,
    Ref,
    check_dtype,
    is_dense,
    launch,
    precision_of,
)

_ROWS, _HELD_OUT, _FEATURES = 16, 32, 64  # of a program's tiles, beside all classes


@triton.jit(do_not_specialize=["num_rows", "num_held_out"])
def fused(
    u_ptr, h_ptr, r_ptr, out_ptr,
    num_rows, num_held_out, num_features, num_classes, scale,
    u_row, u_column, h_row, h_column, r_row, r_column,
    bias: tl.constexpr, block_rows: tl.constexpr, block_held_out: tl.constexpr, block_classes: tl.constexpr,
    block_features: tl.constexpr,
):  # fmt: skip
    """Unlabeled and hold-out features ``[Nu, D]``, ``[Nh, D]``, residuals ``[Nh, C]``; ``out [Nu, C]``."""
    row = (tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows))[:, None]
    column = tl.arange(0, block_classes).to(tl.int64)[None]
    depth = tl.arange(0, block_features).to(tl.int64)
    inside_row = row < num_rows
    inside_column = column < num_classes
    total = tl.zeros((block_rows, block_classes), tl.float32)
    for start in range(0, num_held_out, block_held_out):
        held_out = start + tl.arange(0, block_held_out).to(tl.int64)
        inside_held_out = held_out < num_held_out
        similarity = tl.zeros((block_rows, block_held_out), tl.float32)
        for first in range(0, num_features, block_features):
            feature = first + depth
            inside_feature = feature < num_features
            u = tl.load(u_ptr + row * u_row + feature[None] * u_column, inside_row & inside_feature[None], 0.0)
            h = tl.load(
                h_ptr + feature[:, None] * h_column + held_out[None] * h_row,
                inside_feature[:, None] & inside_held_out[None],
                0.0,
            )
            similarity = tl.dot(u, h, similarity)
        if bias:
            similarity += 1.0  # beyond the hold-out rows it meets residuals of 0
        r = tl.load(
            r_ptr + held_out[:, None] * r_row + column * r_column, inside_held_out[:, None] & inside_column, 0.0
        )
        # Residuals of half types are TF32 numbers; of the similarities three products keep what one would round.
        total = tl.dot(similarity, r.to(tl.float32), total, input_precision="tf32x3")
    out = (scale * total).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * num_classes + column, out, inside_row & inside_column)


def plan(
    features_u: Tensor, features_h: Tensor, residual_h: Tensor, scale: float, bias: bool, *, sums_apart: bool = False
) -> Program:
    """See :func:`fastmeta.ops.feature_similarity`. ``[Nu, C]``; the scale is the call's number."""
    nu, d = checks.matrix(features_u, "features_u", "[Nu, D]").shape
    check_dtype(features_u)
    nh = checks.matrix(features_h, "features_h", "[Nh, D]").shape[0]
    checks.shaped(features_h, "features_h", "[Nh, D]", (nh, d))
    c = checks.matrix(residual_h, "residual_h", "[Nh, C]").shape[1]
    checks.shaped(residual_h, "residual_h", "[Nh, C]", (nh, c))
    checks.like(features_u, "features_u", features_h=features_h, residual_h=residual_h)
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    out = Buffer((nu, c), features_u.dtype)
    if nu == 0 or c == 0 or nh == 0:
        return Program((out,), (), tuple(affine_step(Ref("output", 0), (nu, c))))
    # Every similarity is made, whatever the cheaper order. Both products of float32 by three of TF32 each are more than
    # an assembler gets through.
    fusible = features_u.dtype.itemsize == 2 and nu * nh * (d + c) <= _rule.MOST_FUSED_SIZE
    if _rule.form(max(nu, nh), d, c, aligned=fusible, multiplies=True) == "rows":
        return _by_library(features_u, features_h, residual_h, bias, sums_apart)
    if features_u.dtype.itemsize > 2:
        raise ValueError(f"the fused form takes at most 16-bit numbers, got {features_u.dtype}")
    if c > _rule.MOST_FUSED_CLASSES:
        raise ValueError(f"the fused form takes at most {_rule.MOST_FUSED_CLASSES} classes, got {c}")
    return Program((out,), (), (_fused(features_u, features_h, residual_h, bias),))


def _fused(features_u: Tensor, features_h: Tensor, residual_h: Tensor, bias: bool) -> Launch:
    (nu, d), (nh, c) = features_u.shape, residual_h.shape
    constants = {
        "bias": bias,
        "block_rows": _ROWS,
        "block_held_out": _HELD_OUT,
        "block_classes": max(triton.next_power_of_2(c), 16),
        "block_features": _FEATURES,
    }
    strides = (*features_u.stride(), *features_h.stride(), *residual_h.stride())
    tensors = (Ref("input", 0), Ref("input", 1), Ref("input", 2), Ref("output", 0))
    arguments = (*tensors, nu, nh, d, c, Number(0), *strides)
    return launch(fused, (triton.cdiv(nu, _ROWS),), arguments, constants, num_warps=4, num_stages=2)


def _by_library(features_u: Tensor, features_h: Tensor, residual_h: Tensor, bias: bool, apart: bool) -> Program:
    (nu, d), (nh, c) = features_u.shape, residual_h.shape
    dtype, precision, scale = features_u.dtype, precision_of(features_u), Number(0)
    scratch: list[Buffer] = []
    steps: list[Launch | Product] = []

    def new(rows: int, columns: int) -> Matrix:
        scratch.append(Buffer((rows, columns), dtype))
        return Matrix(Ref("scratch", len(scratch) - 1), (rows, columns), (columns, 1))

    def ones(columns: int) -> Matrix:
        made = new(1, columns)
        steps.extend(affine_step(made.at, made.shape, constant=1.0))
        return made

    operands = []
    for index, tensor in enumerate((features_u, features_h, residual_h)):
        given = Matrix(Ref("input", index), (tensor.shape[0], tensor.shape[1]), (tensor.stride(0), tensor.stride(1)))
        if not is_dense(given):
            copy = new(*given.shape)
            steps += affine_step(copy.at, copy.shape, matrix=given)
            given = copy
        operands.append(given)
    u, h, r = operands
    out = Matrix(Ref("output", 0), (nu, c), (c, 1))
    if d == 0:  # similarities are the bias alone
        gram = new(nu, nh)
        steps += affine_step(gram.at, gram.shape, constant=float(bias))
        steps.append(Product(out, gram, r, alpha=scale, precision=precision))
    elif gram_is_cheaper(nu, nh, d, c):
        gram = new(nu, nh)
        steps.append(Product(gram, u, h.transposed, bias=ones(nh).at if bias else None, precision=precision))
        steps.append(Product(out, gram, r, alpha=scale, precision=precision))
    else:
        by_class, total = new(c, d), None
        product = Product(by_class, r.transposed, h, precision=precision)
        if bias:
            sums, total = new(1, c), new(1, c)
            if apart:
                steps.append(Product(sums, ones(nh), r, precision=precision))
            else:
                product = product._replace(column_sums=sums.at)
            steps.append(product)
            steps += affine_step(total.at, total.shape, matrix=sums, factor=scale)
        else:
            steps.append(product)
        in_passing = total.at if total is not None else None
        steps.append(Product(out, u, by_class.transposed, alpha=scale, bias=in_passing, precision=precision))
    return Program((Buffer((nu, c), dtype),), tuple(scratch), tuple(steps))
