"""The label step of Meta-Gradient: both softmaxes, the step and the projection in one kernel.

A row that fits a tile is read once. Longer ones are swept: once for both softmaxes, once for the sum of what is left
after the clip, and once to write.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmeta import checks
from fastmeta.triton_kernels import _arguments, _forms, _tuning
from fastmeta.triton_kernels._launch import Launch, Plans, layout, on_device
from fastmeta.triton_kernels._rows import softmax


class Tile(NamedTuple):
    """Rows and classes of a program, and its warps."""

    rows: int
    classes: int
    num_warps: int


# 4 to 16 entries a thread and array; smaller tiles for few rows.
WHOLE_ROWS = (
    Tile(32, 16, 4), Tile(32, 32, 4), Tile(16, 64, 4), Tile(8, 128, 4), Tile(4, 256, 4), Tile(2, 512, 4),
    Tile(1, 1024, 4), Tile(1, 2048, 4), Tile(1, 4096, 8),
    Tile(16, 16, 2), Tile(8, 32, 2), Tile(4, 64, 2), Tile(2, 128, 2), Tile(1, 256, 2), Tile(1, 512, 4),
)  # fmt: skip
SWEPT_ROWS = (Tile(1, 2048, 8), Tile(1, 4096, 16))


@triton.jit
def _moved(plus, minus, labels, epsilon, step, inside, project: tl.constexpr):
    """The label after its step from both predictions, and clipped if it is projected."""
    moved = labels - step * (plus - minus) / epsilon
    if project:
        # Not tl.maximum: it would drop a NaN.
        moved = tl.where(inside, tl.where(moved < 0, 0.0, moved), 0.0)
    return moved


@triton.jit
def _normalized(moved, total, num_classes):
    """Divided by the row sum; a row left all 0 becomes uniform."""
    return tl.where(total == 0, 1.0 / num_classes, moved / tl.where(total == 0, 1.0, total))


@triton.jit(do_not_specialize=["num_rows"])
def _whole_rows(
    plus_ptr, minus_ptr, labels_ptr, epsilon_ptr, out_ptr,
    num_rows, num_classes, step,
    plus_row, plus_column, minus_row, minus_column, labels_row, labels_column,
    project: tl.constexpr, block_rows: tl.constexpr, block_classes: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows))[:, None]
    column = tl.arange(0, block_classes).to(tl.int64)[None]
    inside = (row < num_rows) & (column < num_classes)
    minus_infinity = float("-inf")
    plus = tl.load(plus_ptr + row * plus_row + column * plus_column, inside, minus_infinity).to(tl.float32)
    minus = tl.load(minus_ptr + row * minus_row + column * minus_column, inside, minus_infinity).to(tl.float32)
    labels = tl.load(labels_ptr + row * labels_row + column * labels_column, inside, 0.0).to(tl.float32)
    epsilon = tl.load(epsilon_ptr).to(tl.float32)
    moved = _moved(softmax(plus), softmax(minus), labels, epsilon, step, inside, project)
    if project:
        moved = _normalized(moved, tl.sum(moved, 1)[:, None], num_classes)
    tl.store(out_ptr + row * num_classes + column, moved.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _online(top, total, f):
    """Running maximum and sum of ``exp(f - top)`` of every lane; NaN and +inf end in the sum."""
    higher = tl.maximum(top, f)
    origin = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, total * tl.exp(top - origin) + tl.exp(f - origin)


@triton.jit
def _over_lanes(top, total):
    """Maximum and sum of the row from those of the lanes."""
    highest = tl.max(top, 0)
    return highest, tl.sum(total * tl.exp(top - highest), 0)


@triton.jit
def _swept_rows(
    plus_ptr, minus_ptr, labels_ptr, epsilon_ptr, out_ptr,
    num_classes, step,
    plus_row, plus_column, minus_row, minus_column, labels_row, labels_column,
    project: tl.constexpr, block_classes: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    plus_ptr += row * plus_row
    minus_ptr += row * minus_row
    labels_ptr += row * labels_row
    out_ptr += row * num_classes
    lane = tl.arange(0, block_classes).to(tl.int64)
    minus_infinity = float("-inf")

    plus_top = tl.full((block_classes,), minus_infinity, tl.float32)
    minus_top = tl.full((block_classes,), minus_infinity, tl.float32)
    plus_total = tl.zeros((block_classes,), tl.float32)
    minus_total = tl.zeros((block_classes,), tl.float32)
    for start in range(0, num_classes, block_classes):
        column = start + lane
        inside = column < num_classes
        plus = tl.load(plus_ptr + column * plus_column, inside, minus_infinity).to(tl.float32)
        minus = tl.load(minus_ptr + column * minus_column, inside, minus_infinity).to(tl.float32)
        plus_top, plus_total = _online(plus_top, plus_total, plus)
        minus_top, minus_total = _online(minus_top, minus_total, minus)
    highest_plus, sum_plus = _over_lanes(plus_top, plus_total)
    highest_minus, sum_minus = _over_lanes(minus_top, minus_total)
    epsilon = tl.load(epsilon_ptr).to(tl.float32)

    total = 1.0
    if project:
        totals = tl.zeros((block_classes,), tl.float32)
        for start in range(0, num_classes, block_classes):
            column = start + lane
            inside = column < num_classes
            plus = tl.load(plus_ptr + column * plus_column, inside, minus_infinity).to(tl.float32)
            minus = tl.load(minus_ptr + column * minus_column, inside, minus_infinity).to(tl.float32)
            labels = tl.load(labels_ptr + column * labels_column, inside, 0.0).to(tl.float32)
            plus = tl.exp(plus - highest_plus) / sum_plus
            minus = tl.exp(minus - highest_minus) / sum_minus
            totals += _moved(plus, minus, labels, epsilon, step, inside, project)
        total = tl.sum(totals, 0)

    for start in range(0, num_classes, block_classes):
        column = start + lane
        inside = column < num_classes
        plus = tl.load(plus_ptr + column * plus_column, inside, minus_infinity).to(tl.float32)
        minus = tl.load(minus_ptr + column * minus_column, inside, minus_infinity).to(tl.float32)
        labels = tl.load(labels_ptr + column * labels_column, inside, 0.0).to(tl.float32)
        plus = tl.exp(plus - highest_plus) / sum_plus
        minus = tl.exp(minus - highest_minus) / sum_minus
        moved = _moved(plus, minus, labels, epsilon, step, inside, project)
        if project:
            moved = _normalized(moved, total, num_classes)
        tl.store(out_ptr + column, moved.to(out_ptr.dtype.element_ty), inside)


def _tile(n: int, c: int, dtype: torch.dtype) -> tuple[bool, Tile]:
    """Whether whole rows fit a tile, and the tile."""
    classes = max(triton.next_power_of_2(c), 16)
    fitting = tuple(tile for tile in WHOLE_ROWS if tile.classes == classes)
    if not fitting:
        return False, _tuning.tile("finite_difference_labels.swept", dtype, (n, c), SWEPT_ROWS, SWEPT_ROWS[1])
    # The largest tile that keeps the chip busy, else the smallest.
    busy = [tile for tile in fitting if triton.cdiv(n, tile.rows) >= 2 * _forms.chip().processors]
    heuristic = max(busy) if busy else min(fitting)
    return True, _tuning.tile("finite_difference_labels", dtype, (n, c), fitting, heuristic)


class _Plan:
    """The launch for one layout; None where there is nothing to do."""

    def __init__(
        self, logits_plus: Tensor, logits_minus: Tensor, labels: Tensor, epsilon: Tensor, project: bool
    ) -> None:
        n, c = checks.matrix(logits_plus, "logits_plus", "[N, C]").shape
        _arguments.supported(logits_plus)
        checks.shaped(logits_minus, "logits_minus", "[N, C]", (n, c))
        checks.shaped(labels, "labels", "[N, C]", (n, c))
        checks.like(logits_plus, "logits_plus", logits_minus=logits_minus, labels=labels)
        if checks.floating(epsilon, "epsilon").numel() != 1 or epsilon.device != logits_plus.device:
            raise ValueError(f"epsilon must be one element on {logits_plus.device}, got {list(epsilon.shape)}")
        self.strides = (*logits_plus.stride(), *logits_minus.stride(), *labels.stride())
        self.sizes: tuple[int, ...] = (n, c)
        self.launch: Launch | None = None
        if n == 0 or c == 0:
            return
        whole, tile = _tile(n, c, logits_plus.dtype)
        constants: dict[str, int] = {"project": project, "block_rows": tile.rows, "block_classes": tile.classes}
        if whole:
            self.launch = Launch(_whole_rows, (triton.cdiv(n, tile.rows),), constants, num_warps=tile.num_warps)
        else:
            del constants["block_rows"]
            self.sizes = (c,)
            self.launch = Launch(_swept_rows, (n,), constants, num_warps=tile.num_warps)


_PLANS: Plans[_Plan] = Plans()


@on_device
def finite_difference_labels(
    logits_plus: Tensor, logits_minus: Tensor, labels: Tensor, epsilon: Tensor, step: float, project: bool
) -> Tensor:
    """See :func:`fastmeta.ops.finite_difference_labels`. ``[N, C]``."""
    key = (logits_plus.device, project, *layout(logits_plus, logits_minus, labels, epsilon))
    plan = _PLANS.get(key)
    if plan is None:
        plan = _PLANS.keep(key, _Plan(logits_plus, logits_minus, labels, epsilon, project))
    if not math.isfinite(step):
        raise ValueError(f"step must be finite, got {step}")
    out = logits_plus.new_empty(logits_plus.shape)
    if plan.launch is not None:
        plan.launch(logits_plus, logits_minus, labels, epsilon, out, *plan.sizes, float(step), *plan.strides)
    return out
