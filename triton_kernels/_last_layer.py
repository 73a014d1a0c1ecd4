"""The programs of the four last-layer operators: products of a head and of a direction, a row function, and sums.

``rows``: the library makes the products, one kernel the rows. ``fused``: one kernel makes both. Sums over N are a
library product ``R^T h`` after either form; where the library can, that product sums R's columns as well.

A slab is as many rows as the scratch limit allows. Each slab of a sum over N reads and writes the result again,
``12 C D`` bytes in float32 beside ``4 n C D`` operations: as much time at some 500 rows. So such a slab is never
smaller than four times the result.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastmeta.losses import BY_CODE, LOSSES
from fastmeta.triton_kernels import _fused, _rule
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
    multiple,
    precision_of,
    vector_step,
)
from fastmeta.triton_kernels._row_functions import DOT, LABEL_TANGENT, RESIDUAL, reads_targets
from fastmeta.triton_kernels._rows import rows

_ENTRIES = 512  # of a warp that holds whole rows: sixteen a thread, two operands and their sums in 64 registers
_MOST_CLASSES = 8192  # of a row that a program holds
_SWEPT = 2048  # classes of a step over a longer row, two groups a thread
_IN_PASSING = 1 << 24  # most entries of R whose columns the product sums; that costs it a fifth of its time


class LastLayerCall(NamedTuple):
    """One operator's tensors of one layout.

    Args:
        function: what a row becomes, of :mod:`._row_functions`.
        loss: its number.
        tensors: the operator's arguments by name, in its order: features, and any of logits, head_weight, head_bias,
            targets, weights, direction_weight, direction_bias.
        precision: of float32 products.
        damped: whether the direction is added to the result, times the call's number.
    """

    function: int
    loss: int
    tensors: dict[str, Tensor | None]
    precision: str = "ieee"
    damped: bool = False

    def tensor(self, name: str) -> Tensor | None:
        """An argument; None for targets, logits and a head that the row function does not read."""
        if name in ("logits", "head_weight", "head_bias") and self.label_slope is not None:
            return None
        if name == "targets" and not reads_targets(self.loss, self.function):
            return None
        return self.tensors.get(name)

    @property
    def label_slope(self) -> float | None:
        """The factor of a label tangent that is a constant times the logit tangent; None for others."""
        return BY_CODE[self.loss].label_slope if self.function == LABEL_TANGENT.value else None

    def ref(self, name: str, row: int = 0) -> Ref | None:
        """The memory of an argument, from row ``row`` on."""
        tensor = self.tensor(name)
        return None if tensor is None else Ref("input", list(self.tensors).index(name), row * tensor.stride(0))

    def matrix(self, name: str) -> Matrix:
        """An argument; a vector is a matrix of one row."""
        tensor, at = self.tensor(name), self.ref(name)
        assert tensor is not None
        assert at is not None
        rows, columns = (1, *tensor.shape) if tensor.dim() == 1 else tensor.shape
        strides = (columns, tensor.stride(0)) if tensor.dim() == 1 else (tensor.stride(0), tensor.stride(1))
        return Matrix(at, (rows, columns), strides)

    def strides(self, name: str) -> tuple[int, int]:
        """Of an argument that may be left out; a vector's second stride is 1."""
        tensor = self.tensor(name)
        return (0, 1) if tensor is None else (*tensor.stride(), 1)[:2]  # type: ignore[return-value]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """N, D, C."""
        (n, d), outputs = self.tensors["features"].shape, self.tensors.get("logits")  # type: ignore[union-attr]
        of_outputs = self.tensors.get("head_weight") if outputs is None else outputs.mT
        return n, d, of_outputs.shape[0]  # type: ignore[union-attr]

    @property
    def dtype(self) -> torch.dtype:
        """Of every floating tensor."""
        return self.tensors["features"].dtype  # type: ignore[union-attr]

    @property
    def classes(self) -> bool:
        """Whether targets are classes."""
        targets = self.tensor("targets")
        return targets is not None and targets.dim() == 1

    @property
    def per_row(self) -> bool:
        """Whether the result has a row for each example."""
        return self.function in (DOT.value, LABEL_TANGENT.value)

    def begins_aligned(self, name: str) -> bool:
        """Whether an argument begins at a multiple of 16 bytes."""
        tensor = self.tensor(name)
        return tensor is None or tensor.data_ptr() % 16 == 0

    @property
    def aligned(self) -> bool:
        """Whether the products' operands can be copied 16 bytes at a time."""
        names = ("features", "head_weight", "direction_weight")
        return _fused.is_aligned(self.sizes[1], *(self.tensor(name) for name in names))

    def form(self) -> _rule.Form:
        """By the rule."""
        n, d, c = self.sizes
        multiplies = self.tensor("head_weight") is not None or self.tensor("direction_weight") is not None
        return _rule.form(n, d, c, aligned=self.aligned or self.dtype.itemsize == 2, multiplies=multiplies)


def call_of(function: int, loss: int, tensors: dict[str, Tensor | None], *, damped: bool = False) -> LastLayerCall:
    """The call for tensors that are checked already."""
    if not 0 <= loss < len(LOSSES):
        raise ValueError(f"loss must be in [0, {len(LOSSES)}), got {loss}")
    features = tensors["features"]
    assert features is not None
    check_dtype(features)
    return LastLayerCall(function, loss, tensors, precision_of(features), damped)


def plan(call: LastLayerCall, *, sums_apart: bool = False) -> Program:
    """The program of a call.

    Args:
        call: the operator's tensors, checked.
        sums_apart: R's columns are summed by a product of their own, whatever its size.
    """
    return _results_of_rows(call) if call.per_row else _sums(call, sums_apart)


def _results_of_rows(call: LastLayerCall) -> Program:
    n, d, c = call.sizes
    dots = call.function == DOT.value
    out = Buffer((n,) if dots else (n, c), call.dtype)
    if n == 0 or c == 0:
        return Program((out,), (), tuple(affine_step(Ref("output", 0), (1, n if dots else 0))))
    memory = _Scratch(call)
    steps: list[Launch | Product] = memory.copies()
    slope = call.label_slope
    if slope is not None and call.tensor("direction_bias") is None and d > 0 and not memory.fused:
        scale = Number(1, slope)
        product = memory.product(Ref("output", 0), c, "direction", 0, n)
        return Program((out,), memory.buffers(), (*steps, *(step._replace(alpha=scale) for step in product)))
    for first, count in memory.slabs():
        at = Ref("output", 0, first * (1 if dots else c))
        steps += _rows(call, memory, at, 0 if dots else c, first, count)
    return Program((out,), memory.buffers(), tuple(steps))


def _sums(call: LastLayerCall, apart: bool) -> Program:
    n, d, c = call.sizes
    dtype = call.dtype
    with_bias = call.function == RESIDUAL.value or call.tensor("direction_bias") is not None
    weight, bias = Ref("output", 0), Ref("output", 1)
    outputs = Buffer((c, d), dtype), Buffer((c if with_bias else 0,), dtype)
    if n == 0 or c == 0:
        return Program(outputs, (), tuple(_only_damped(call, with_bias)))
    memory = _Scratch(call, least=4 * d)
    slabs = list(memory.slabs())
    apart = with_bias and (apart or call.damped or len(slabs) > 1 or d == 0 or n * c > _IN_PASSING)
    # Several slabs of 16-bit results add up in float32.
    wide = len(slabs) > 1 and dtype.itemsize == 2
    if wide:
        weight, bias = memory.new((c, d), torch.float32), memory.new((c,), torch.float32)
    ones = memory.new((memory.rows,), dtype) if apart else None
    steps: list[Launch | Product] = memory.copies("direction" if call.damped and not wide else "")
    into, sums = Matrix(weight, (c, d), (d, 1)), Matrix(bias, (1, c), (c, 1))
    damped = call.damped and not wide
    for turn, (first, count) in enumerate(slabs):
        steps += _rows(call, memory, memory.result, memory.pitch, first, count, ones)
        r, h = Matrix(memory.result, (count, c), (memory.pitch, 1)), memory.operand("features", first, count)
        product = Product(into, r.transposed, h, precision=call.precision)
        of_ones = Product(sums, Matrix(ones or bias, (1, count), (count, 1)), r, precision=call.precision)
        if turn > 0:
            product, of_ones = (one._replace(beta=1.0, addend=one.out) for one in (product, of_ones))
        elif damped:
            product = product._replace(beta=Number(1), addend=memory.operand("direction_weight"))
            if with_bias:
                of_ones = of_ones._replace(beta=Number(1), addend=memory.operand("direction_bias"))
        if with_bias and not apart:
            product = product._replace(column_sums=bias)
        steps += ([product] if d > 0 else []) + ([of_ones] if apart else [])
    if wide:
        steps += _rounded(call, with_bias, weight, bias)
    return Program(outputs, memory.buffers(), tuple(steps))


def _only_damped(call: LastLayerCall, with_bias: bool) -> list[Launch]:
    """No examples: the direction times the damping, or zeros."""
    return _rounded(call, with_bias, None, None)


def _rounded(call: LastLayerCall, with_bias: bool, weight: Ref | None, bias: Ref | None) -> list[Launch]:
    """Write float32 sums, or zeros, plus the damped direction into the results, rounded once."""
    _, d, c = call.sizes
    parts = [("weight", weight, (c, d))] + ([("bias", bias, (1, c))] if with_bias else [])
    steps: list[Launch] = []
    for index, (name, total, shape) in enumerate(parts):
        addend = call.matrix(f"direction_{name}") if call.damped else None
        factor = Number(1) if call.damped else 0.0
        steps += affine_step(Ref("output", index), shape, total=total, matrix=addend, factor=factor)
    return steps


class _Scratch:
    """Scratch memory of a call, its slabs of rows, and what products read."""

    def __init__(self, call: LastLayerCall, least: int = 1) -> None:
        self.call = call
        self.n, self.d, c = call.sizes
        dtype = call.dtype
        self.pitch = triton.cdiv(c, 16) * 16  # entries from row to row: rows begin at multiples of 16 bytes
        self.fused = call.form() == "fused"
        head, direction = call.tensor("head_weight") is not None, call.tensor("direction_weight") is not None
        # Memory for products that the kernel does not make, and for R if there is no product to overwrite.
        needs_f = head and not self.fused
        needs_z = direction and not self.fused and call.function != LABEL_TANGENT.value
        needs_r = not call.per_row and not (needs_f or needs_z)
        matrices = needs_f + needs_z + needs_r
        self.rows = _rule.slab_rows(self.n, matrices * self.pitch * dtype.itemsize, least) if matrices else self.n
        self._buffers: list[Buffer] = []
        new = [self.new((self.rows, self.pitch), dtype) for _ in range(matrices)]
        self.f = new[0] if needs_f else None
        self.z = new[-1] if needs_z else None
        self.result = new[-1] if new else Ref("scratch", 0)
        self._copied: dict[str, Matrix] = {}

    def new(self, shape: tuple[int, ...], dtype: torch.dtype) -> Ref:
        """One more buffer."""
        self._buffers.append(Buffer(shape, dtype))
        return Ref("scratch", len(self._buffers) - 1)

    def buffers(self) -> tuple[Buffer, ...]:
        """All there are."""
        return tuple(self._buffers)

    def slabs(self) -> Iterator[tuple[int, int]]:
        """First row and number of rows of each."""
        for first in range(0, self.n, self.rows):
            yield first, min(self.rows, self.n - first)

    def copies(self, added: str = "") -> list[Launch | Product]:
        """Launches that copy operands of products whose strides the library does not take; ``added`` names one more."""
        call = self.call
        multiplied = {"features"} if not (self.fused and call.per_row) else set()
        for name in ("head", "direction"):
            if name == added or not self.fused:
                multiplied |= {f"{name}_weight", f"{name}_bias"}
        steps: list[Launch | Product] = []
        for name in call.tensors:
            if name in multiplied and call.tensor(name) is not None and self.d > 0:
                matrix = call.matrix(name)
                # The addend needs the result's layout; the library reads a bias 16 bytes at a time.
                across = name == f"{added}_weight" and matrix.strides[1] != 1
                if not is_dense(matrix) or across or (name.endswith("_bias") and not call.begins_aligned(name)):
                    at = self.new(matrix.shape, call.dtype)
                    steps += affine_step(at, matrix.shape, matrix=matrix)
                    self._copied[name] = Matrix(at, matrix.shape, (matrix.shape[1], 1))
        return steps

    def operand(self, name: str, first: int = 0, count: int | None = None) -> Matrix:
        """Rows of an argument, or of its copy; a vector is a matrix of one row."""
        matrix = self._copied.get(name) or self.call.matrix(name)
        rows = matrix.shape[0] if count is None else count
        return Matrix(matrix.at.shifted(first * matrix.strides[0]), (rows, matrix.shape[1]), matrix.strides)

    def product(self, out: Ref, pitch: int, of: str, first: int, count: int) -> list[Launch | Product]:
        """``h W^T + b`` of some rows, for ``of`` a head or a direction."""
        bias = self.operand(f"{of}_bias") if self.call.tensor(f"{of}_bias") is not None else None
        into = Matrix(out, (count, self.call.sizes[2]), (pitch, 1))
        if self.d == 0:
            whole = Matrix(out, (count, self.call.sizes[2]), (pitch, 1))
            rows = bias and Matrix(bias.at, whole.shape, (0, bias.strides[1]))
            return [*affine_step(out, whole.shape, pitch=pitch, matrix=rows)]
        h, factor = self.operand("features", first, count), self.operand(f"{of}_weight").transposed
        return [Product(into, h, factor, bias=bias and bias.at, precision=self.call.precision)]


def _rows(
    call: LastLayerCall, memory: _Scratch, out: Ref, out_row: int, first: int, count: int, ones: Ref | None = None
) -> Iterator[Launch | Product]:
    """The row function of some rows, into ``out``."""
    if memory.fused:
        yield _fused_rows(call, out, out_row, first, count, ones)
        return
    c = call.sizes[2]
    f, (f_row, f_column) = call.ref("logits", first), call.strides("logits")
    if memory.f is not None:
        f, f_row, f_column = memory.f, memory.pitch, 1
        yield from memory.product(f, f_row, "head", first, count)
    z, z_row = memory.z, memory.pitch
    if call.tensor("direction_weight") is not None:
        if z is None:
            z, z_row = out, out_row
        yield from memory.product(z, z_row, "direction", first, count)
    y, (y_row, y_column) = call.ref("targets", first), call.strides("targets")
    weights, (weights_step, _) = call.ref("weights", first), call.strides("weights")
    by = multiple(c, f_row, z_row, 0 if call.classes else y_row, out_row)
    tile = row_tile(c, call.dtype)
    strides = f_row // by, f_column, z_row // by, y_row if call.classes else y_row // by, y_column
    constants = {
        "loss": call.loss,
        "function": call.function,
        "classes": call.classes,
        "multiple": by,
        **tile.constants(c),
    }
    scale = Number(1) if call.function == LABEL_TANGENT.value else 1.0
    arguments = (f, z, y, weights, out, ones, count, c // by, scale, *strides, weights_step, out_row // by)
    yield launch(rows, (triton.cdiv(count, tile.rows),), arguments, constants, num_warps=tile.warps)


class RowTile(NamedTuple):
    """Rows and classes of a program, neighbouring classes of a thread, and warps."""

    rows: int
    classes: int
    group: int
    warps: int

    def constants(self, num_classes: int) -> dict[str, Any]:
        """Of a kernel over rows of so many classes."""
        single = self.classes >= num_classes
        return {"block_rows": self.rows, "block_classes": self.classes, "group": self.group, "single": single}


def row_tile(c: int, dtype: torch.dtype) -> RowTile:
    """Whole rows, or a step over longer ones. Measured on an H200: mostly within 5% of the fastest."""
    group, classes = 16 // dtype.itemsize, max(triton.next_power_of_2(c), 16)
    if classes > _MOST_CLASSES:
        return RowTile(1, _SWEPT, group, _SWEPT // (2 * group * 32))
    return RowTile(max(1, _ENTRIES // classes), classes, group, max(1, classes // _ENTRIES))


def _fused_rows(call: LastLayerCall, out: Ref, out_row: int, first: int, count: int, ones: Ref | None) -> Launch:
    _, d, c = call.sizes
    tile = _fused.tile(c, call.dtype, call.aligned)
    f_row, f_column = call.strides("logits")
    y_row, y_column = call.strides("targets")
    features_row, features_column = call.strides("features")
    head_row, head_column = call.strides("head_weight")
    direction_row, direction_column = call.strides("direction_weight")
    by = multiple(c, f_row, 0 if call.classes else y_row, out_row)
    depth = multiple(d, features_row, head_row, direction_row)
    constants = {
        "loss": call.loss,
        "function": call.function,
        "classes": call.classes,
        "multiple": by,
        "feature_multiple": depth,
        "even": d % tile.features == 0,
        "precision": _fused.arithmetic(call.precision),
        "block_rows": tile.rows,
        "block_classes": tile.classes,
        "block_features": tile.features,
    }
    names = ("head_weight", "head_bias", "targets", "weights", "direction_weight", "direction_bias")
    per_row = {"targets", "weights"}
    tensors = [call.ref("features", first), call.ref("logits", first)]
    tensors += [call.ref(name, first if name in per_row else 0) for name in names]
    scale = Number(1) if call.function == LABEL_TANGENT.value else 1.0
    numbers = (
        *(count, d // depth, c // by, scale, features_row // depth, features_column, f_row // by, f_column),
        *(head_row // depth, head_column, vector_step(call.tensor("head_bias"))),
        *(y_row if call.classes else y_row // by, y_column, call.strides("weights")[0]),
        *(direction_row // depth, direction_column, vector_step(call.tensor("direction_bias")), out_row // by),
    )
    return launch(
        _fused.fused,
        (triton.cdiv(count, tile.rows),),
        (*tensors, out, ones, *numbers),
        constants,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
