"""Which form of an operator serves a shape: a cost model of launches, flops and bytes, and a way to force a form.

``rows``   the library's matrix products and one fused row kernel, in slabs of rows within :func:`slab_limit`.
``fused``  one launch, or two for sums over N, and no library product: small shapes, whole rows in a program.
``flash``  one fused kernel over tiles of classes with an online softmax: neither logits nor tangents are written.

The rates are the chips' published peaks, the fractions of them are other projects' published results, and the cost of
a launch is an estimate. None was measured by this project: ``python -m bench gpu`` sets the model's choice against the
fastest form.
"""

import contextlib
import math
import os
from collections.abc import Collection, Iterator
from functools import cache
from typing import NamedTuple

import torch

from fastmeta.triton_kernels import _launch

FORMS = ("rows", "fused", "flash")


class Chip(NamedTuple):
    """Published peaks: flops per second of dense products, bytes per second, multiprocessors."""

    float32: float
    tf32: float
    half: float
    memory: float
    l2: float  # 5,120 bytes a clock
    processors: int


# By compute capability: NVIDIA's data sheets of A100 80 GB, H200 and B200.
CHIPS = {
    80: Chip(19.5e12, 156e12, 312e12, 2.0e12, 7.2e12, 108),
    90: Chip(67e12, 495e12, 989e12, 4.8e12, 9.0e12, 132),
    100: Chip(75e12, 1100e12, 2250e12, 8.0e12, 9.4e12, 148),
}
DEFAULT_CHIP = 90  # where there is no GPU: forms are then chosen for tests and for ``python -m bench resources``

LIBRARY_RATE = 0.80  # cuBLAS and its peers on large products: 76-80% of the peak
TRITON_RATE = 0.45  # Triton's linear cross-entropy kernels: 38-52%
ROW_BANDWIDTH = 0.85 * 0.9  # a row kernel of 85% of a copy, a copy of 90% of the peak
L2_BANDWIDTH = 0.5
LAUNCH = 4e-6  # seconds from one kernel to the next; eager PyTorch: 4-5, a compiled launcher: 3-6

ROW_TILE = 16  # rows of a program in the fused form
LIBRARY_TILE = 64  # smallest output tile of a library product that is worth counting on
FLASH_TILE = 128
_SPLIT = 512  # length of a reduction that is worth a program of its own

# Up to this size (768, 512, 200) a call waits for the host to launch it, which the sums below leave out: there a form
# of more than two launches is not taken if another is offered.
LAUNCH_BOUND = 768 * 512 * 200


@cache
def chip() -> Chip:
    """The GPU of this process, or the nearest older one in the table."""
    capability = DEFAULT_CHIP
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        capability = 10 * major + minor
    return CHIPS[max((known for known in CHIPS if known <= capability), default=min(CHIPS))]


def peak(dtype: torch.dtype, precision: str = "ieee") -> float:
    """Flops per second of products in ``dtype``; ``precision`` is that of float32 products."""
    if dtype == torch.float32:
        return chip().tf32 if precision == "tf32" else chip().float32
    return chip().half


def library_seconds(rows: int, columns: int, depth: int, dtype: torch.dtype, precision: str = "ieee") -> float:
    """A library product ``[rows, depth] x [depth, columns]``: its flops or its bytes, and its launch."""
    tiles = math.ceil(rows / LIBRARY_TILE) * math.ceil(columns / LIBRARY_TILE) * max(1, depth // _SPLIT)
    busy = min(1.0, max(tiles, 1) / chip().processors)
    flops = 2.0 * rows * columns * depth / (LIBRARY_RATE * busy * peak(dtype, precision))
    return LAUNCH + max(flops, memory_seconds(rows * columns + (rows + columns) * depth, dtype))


def tile_seconds(flops: float, programs: int, dtype: torch.dtype, precision: str = "ieee") -> float:
    """Products within a Triton kernel of so many programs, without its launch."""
    return flops / (TRITON_RATE * min(1.0, max(programs, 1) / chip().processors) * peak(dtype, precision))


def memory_seconds(entries: float, dtype: torch.dtype) -> float:
    """Reading or writing so many entries."""
    return entries * dtype.itemsize / (ROW_BANDWIDTH * chip().memory)


def l2_seconds(entries: float, dtype: torch.dtype) -> float:
    """Reading so many entries that some other program reads as well."""
    return entries * dtype.itemsize / (L2_BANDWIDTH * chip().l2)


# Of each operator: products before the row function beside a head's, whether R^T h follows it, matrices [N, C] that
# are read beside the logits, and those written.
_WORK = {
    "per_example_dot": (1, False, 1, 0),
    "label_gradient": (1, False, 0, 1),
    "last_layer_gradient": (0, True, 1, 0),
    "hessian_vector_product": (1, True, 0, 0),
}


def costs(
    operator: str, n: int, d: int, c: int, dtype: torch.dtype, head: bool = False, precision: str = "ieee"
) -> dict[str, float]:
    """The model's estimate of every form of a last-layer operator, in seconds."""
    before, transposed, read, written = _WORK[operator]
    matrices = read + written + (0 if head else 1)
    before += head
    product = 2.0 * n * d * c
    after = library_seconds(c, d, n, dtype, precision) if transposed else 0.0

    # Every product is written and read back, and so is R.
    scratch = before + transposed
    slabs = math.ceil(n / slab_rows(n, scratch * c * dtype.itemsize)) if scratch else 1
    rows = before * library_seconds(n, c, d, dtype, precision) + after + LAUNCH * (1 + transposed)
    rows += memory_seconds((matrices + before + transposed) * n * c, dtype)
    rows += (slabs - 1) * (before + 1 + transposed) * LAUNCH

    # Every program reads the direction and the head; R is written and read back by the second launch.
    programs = math.ceil(n / ROW_TILE)
    padded = 2.0 * n * d * max(16, 2 ** math.ceil(math.log2(max(c, 1))))
    fused = LAUNCH + memory_seconds(matrices * n * c + n * d, dtype)
    fused += max(
        tile_seconds(before * padded, programs, dtype, precision), l2_seconds(before * programs * c * d, dtype)
    )
    if transposed:
        tiles = math.ceil(c / LIBRARY_TILE) * math.ceil(d / LIBRARY_TILE) * max(1, n // _SPLIT)
        fused += LAUNCH + tile_seconds(product, tiles, dtype, precision) + memory_seconds(2 * n * c + c * d, dtype)

    # Once for the rows' statistics; what is written per row and class takes a second sweep of products or, where it is
    # the result itself, of reading it back.
    sweeps = 2 if transposed else 1
    tiles = math.ceil(n / FLASH_TILE) * math.ceil(c / FLASH_TILE)
    flash = LAUNCH * (1 + sweeps) + tile_seconds(sweeps * before * product, tiles, dtype, precision)
    flash += memory_seconds(sweeps * matrices * n * c + (n + c) * d, dtype) + after
    return {"rows": rows, "fused": fused, "flash": flash}


def choose(
    operator: str,
    n: int,
    d: int,
    c: int,
    dtype: torch.dtype,
    head: bool = False,
    *,
    precision: str = "ieee",
    offered: Collection[str] = FORMS,
) -> str:
    """The form of a last-layer operator at this shape, out of those offered: the cheapest, or the forced one.

    Args:
        operator: its public name.
        n: examples.
        d: features.
        c: classes.
        dtype: of the features.
        head: whether the logits are recomputed from a head.
        precision: of float32 products, ``ieee`` or ``tf32``.
        offered: the forms the operator has at this shape.

    Raises:
        ValueError: the forced form is not offered.
    """
    before, transposed, _, _ = _WORK[operator]
    launches = {"rows": before + head + 1 + transposed, "fused": 1 + transposed, "flash": 3 if transposed else 2}
    forms = set(offered)
    if n * d * c <= LAUNCH_BOUND and _forced is None:
        forms = {form for form in offered if launches[form] <= 2} or forms
    estimates = costs(operator, n, d, c, dtype, head, precision)
    return cheapest(operator, {form: cost for form, cost in estimates.items() if form in forms})


def cheapest(operator: str, estimates: dict[str, float]) -> str:
    """The form of the least cost, or the forced one."""
    if _forced is None:
        return min(estimates, key=estimates.__getitem__)
    if _forced not in estimates:
        raise ValueError(f"{operator} has no form {_forced!r} at this shape, only {', '.join(estimates)}")
    return _forced


_forced: str | None = None


def forced() -> str | None:
    """The form that :func:`force` asks for."""
    return _forced


@contextlib.contextmanager
def force(form: str) -> Iterator[None]:
    """Have every operator take this form in the block, in all threads: for tests and benchmarks.

    Raises:
        ValueError: there is no such form. An operator that lacks it at a shape raises when it is called.
    """
    global _forced
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    before, _forced = _forced, form
    _launch.forget_plans()
    try:
        yield
    finally:
        _forced = before
        _launch.forget_plans()


_slab_bytes = int(os.environ.get("FASTMETA_SLAB_MB", "256")) << 20


@contextlib.contextmanager
def slab_limit(limit: int) -> Iterator[None]:
    """Let the scratch of the ``rows`` form take at most so many bytes in the block, in all threads.

    Outside such a block it is 256 MB, or what ``FASTMETA_SLAB_MB`` says when fastmeta is imported.
    """
    global _slab_bytes
    before, _slab_bytes = _slab_bytes, limit
    _launch.forget_plans()
    try:
        yield
    finally:
        _slab_bytes = before
        _launch.forget_plans()


def slab_bytes() -> int:
    """The limit that holds now."""
    return _slab_bytes


def slab_rows(n: int, bytes_per_row: int) -> int:
    """Rows of a slab whose scratch stays within the limit: at least 1, a multiple of 128 where that many fit."""
    rows = max(1, _slab_bytes // max(bytes_per_row, 1))
    if rows >= n:
        return max(n, 1)
    return rows // 128 * 128 if rows >= 128 else rows
