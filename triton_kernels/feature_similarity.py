"""``scale (h_u h_H^T + 1) r_H`` in two forms.

``rows``   library products alone, in either association order, with the bias and the scale folded into them: two
           launches by way of the Gram matrix ``[Nu, Nh]``, three by way of ``r^T h``, two without a bias.
``fused``  one launch: a program holds rows of the result and goes over the hold-out examples, whose similarities it
           keeps in float32, so that nothing between the two products is rounded.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmeta import checks
from fastmeta.ops.feature_similarity import gram_is_cheaper
from fastmeta.triton_kernels import _arguments, _forms, _tuning
from fastmeta.triton_kernels._launch import Launch, Plans, layout, on_device, precision


class Tile(NamedTuple):
    """Unlabeled rows, hold-out rows, classes and features that a program holds, and its warps and stages."""

    rows: int
    held_out: int
    classes: int
    features: int
    num_warps: int
    num_stages: int


TILES = (
    Tile(16, 64, 16, 64, 4, 2), Tile(16, 64, 32, 64, 4, 2), Tile(16, 32, 64, 64, 4, 2), Tile(16, 32, 128, 32, 4, 2),
    Tile(16, 32, 256, 32, 8, 2),
    Tile(32, 32, 16, 32, 4, 2), Tile(32, 32, 32, 32, 4, 2), Tile(32, 32, 64, 64, 8, 2), Tile(32, 32, 128, 64, 8, 2),
)  # fmt: skip
MOST_CLASSES = 256  # of the fused form: one program holds a row of the result


@triton.jit(do_not_specialize=["num_rows", "num_held_out"])
def _fused(
    u_ptr, h_ptr, r_ptr, out_ptr,
    num_rows, num_held_out, num_features, num_classes, scale,
    u_row, u_column, h_row, h_column, r_row, r_column,
    bias: tl.constexpr, block_rows: tl.constexpr, block_held_out: tl.constexpr, block_classes: tl.constexpr,
    block_features: tl.constexpr, similarity_precision: tl.constexpr, sum_precision: tl.constexpr,
):  # fmt: skip
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
            similarity = tl.dot(u, h, similarity, input_precision=similarity_precision)
        if bias:
            similarity += 1.0  # beyond the hold-out rows it meets residuals of 0
        r = tl.load(
            r_ptr + held_out[:, None] * r_row + column * r_column, inside_held_out[:, None] & inside_column, 0.0
        )
        total = tl.dot(similarity, r.to(tl.float32), total, input_precision=sum_precision)
    out = (scale * total).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * num_classes + column, out, inside_row & inside_column)


def _tile(nu: int, nh: int, d: int, c: int, dtype: torch.dtype) -> Tile:
    classes = max(triton.next_power_of_2(c), 16)
    fitting = tuple(tile for tile in TILES if tile.classes == classes)
    wide = triton.cdiv(nu, fitting[-1].rows) >= _forms.chip().processors
    return _tuning.tile("feature_similarity", dtype, (nu, nh, d, c), fitting, fitting[-1 if wide else 0])


def _library_seconds(gram: bool, bias: bool, nu: int, nh: int, d: int, c: int, dtype: torch.dtype, by: str) -> float:
    """The model's estimate of an association order."""
    if gram:
        return _forms.library_seconds(nu, nh, d, dtype, by) + _forms.library_seconds(nu, c, nh, dtype, by)
    products = _forms.library_seconds(d, c, nh, dtype, by) + _forms.library_seconds(nu, c, d, dtype, by)
    return products + (_forms.library_seconds(1, c, nh, dtype, by) if bias else 0.0)


def _fused_seconds(nu: int, nh: int, d: int, c: int, dtype: torch.dtype, by: str) -> float:
    """The model's estimate of the fused form."""
    tile = _tile(nu, nh, d, c, dtype)
    programs = triton.cdiv(nu, tile.rows)
    products = _forms.tile_seconds(2.0 * nu * nh * (d + tile.classes), programs, dtype, by)
    return _forms.LAUNCH + max(products, _forms.l2_seconds(programs * nh * (d + c), dtype))


class _Plan:
    """The form for one layout."""

    def __init__(self, features_u: Tensor, features_h: Tensor, residual_h: Tensor, bias: bool, by: str) -> None:
        nu, d = checks.matrix(features_u, "features_u", "[Nu, D]").shape
        _arguments.supported(features_u)
        nh = checks.matrix(features_h, "features_h", "[Nh, D]").shape[0]
        checks.shaped(features_h, "features_h", "[Nh, D]", (nh, d))
        c = checks.matrix(residual_h, "residual_h", "[Nh, C]").shape[1]
        checks.shaped(residual_h, "residual_h", "[Nh, C]", (nh, c))
        checks.like(features_u, "features_u", features_h=features_h, residual_h=residual_h)
        dtype = features_u.dtype
        self.shape = (nu, c)
        self.sizes = (nu, nh, d, c)
        self.strides = (*features_u.stride(), *features_h.stride(), *residual_h.stride())
        self.launch: Launch | None = None
        self.ones: Tensor | None = None
        self.count_h = nh
        self.bias = bias
        self.empty = nu == 0 or c == 0
        orders = {gram: _library_seconds(gram, bias, nu, nh, d, c, dtype, by) for gram in (False, True)}
        self.gram = gram_is_cheaper(nu, nh, d, c)
        # Small products: fewer launches count for more. Not in float16, whose range a similarity may exceed.
        if max(nu, nh) * d * c <= _forms.LAUNCH_BOUND and dtype != torch.float16:
            self.gram = min(orders, key=orders.__getitem__)
        estimates = {"rows": orders[self.gram]}
        if c <= MOST_CLASSES and not self.empty:
            estimates["fused"] = _fused_seconds(nu, nh, d, c, dtype, by)
        if self.empty or _forms.cheapest("feature_similarity", estimates) == "rows":
            return
        tile = _tile(nu, nh, d, c, dtype)
        constants = {
            "bias": bias,
            "block_rows": tile.rows,
            "block_held_out": tile.held_out,
            "block_classes": tile.classes,
            "block_features": tile.features,
            "similarity_precision": by,
            # Residuals of half types are TF32 numbers; of the similarities three products keep what one would round.
            "sum_precision": by if dtype == torch.float32 else "tf32x3",
        }
        grid = (triton.cdiv(nu, tile.rows),)
        self.launch = Launch(_fused, grid, constants, num_warps=tile.num_warps, num_stages=tile.num_stages)

    def by_library(self, features_u: Tensor, features_h: Tensor, residual_h: Tensor, scale: float, out: Tensor) -> None:
        """The ``rows`` form."""
        ones = self._ones(residual_h) if self.bias else None
        if self.gram:
            h = features_h.t()
            # Added within the product, by cuBLASLt: the factor of the bias is 1.
            similarity = torch.mm(features_u, h) if ones is None else torch.addmm(ones[0], features_u, h)
            out.addmm_(similarity, residual_h, beta=0, alpha=scale)
            return
        product = torch.mm(features_h.t(), residual_h)
        if ones is None:
            out.addmm_(features_u, product, beta=0, alpha=scale)
            return
        total = torch.empty(1, out.shape[1], dtype=out.dtype, device=out.device)
        total.addmm_(ones, residual_h, beta=0, alpha=scale)
        torch.addmm(total[0], features_u, product, alpha=scale, out=out)

    def _ones(self, like: Tensor) -> Tensor:
        """``[1, Nh]``, kept from the first call on."""
        if self.ones is not None:
            return self.ones
        if like.is_cuda and torch.cuda.is_current_stream_capturing():
            return torch.ones(1, self.count_h, dtype=like.dtype, device=like.device)  # the graph fills it
        # Copied from the CPU: it is there for every stream once this returns.
        self.ones = torch.ones(1, self.count_h, dtype=like.dtype).to(like.device)
        return self.ones


_PLANS: Plans[_Plan] = Plans()


@on_device
def feature_similarity(features_u: Tensor, features_h: Tensor, residual_h: Tensor, scale: float, bias: bool) -> Tensor:
    """See :func:`fastmeta.ops.feature_similarity`. ``[Nu, C]``."""
    by = precision(features_u.dtype)
    key = (features_u.device, bias, by, *layout(features_u, features_h, residual_h))
    plan = _PLANS.get(key)
    if plan is None:
        plan = _PLANS.keep(key, _Plan(features_u, features_h, residual_h, bias, by))
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    out = features_u.new_empty(plan.shape)
    if plan.launch is not None:
        plan.launch(features_u, features_h, residual_h, out, *plan.sizes, float(scale), *plan.strides)
    elif not plan.empty:
        plan.by_library(features_u, features_h, residual_h, scale, out)
    return out
