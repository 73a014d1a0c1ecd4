"""Which form of an operator serves a call.

``fused``  one launch for products and row function (:mod:`._fused`): up to 128 classes and 2^27 multiplications.
``rows``   everything else: the library's products and one row kernel (:mod:`._rows`), in slabs of rows within
           :func:`slab_limit`.

Up to 32 outputs CUDA C++ serves before this rule is asked, except 16-bit results with a row for each example. One rule
serves calls on the stream and in a CUDA graph: both are launched from C, where one more launch costs the host 1 us.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Literal

from fastmeta import _extension

Form = Literal["rows", "fused"]
FORMS: tuple[Form, ...] = ("rows", "fused")
MOST_FUSED_CLASSES = 128
MOST_FUSED_SIZE = 1 << 27  # N D C: every 16 rows read W and V once more, 3 us of the L2 cache at this size

_forced: Form | None = None
_slab_bytes = int(os.environ.get("FASTMETA_SLAB_MB", "256")) << 20


def form(n: int, d: int, c: int, *, aligned: bool, multiplies: bool) -> Form:
    """The form of an operator.

    Args:
        n: examples.
        d: features.
        c: classes.
        aligned: whether a kernel can make the products: float32 operands have to be copied 16 bytes at a time.
        multiplies: whether the row function needs a product; the residual of given logits does not.
    """
    if not multiplies:
        return "rows"
    if _forced is not None:
        return _forced
    return "fused" if aligned and c <= MOST_FUSED_CLASSES and n * d * c <= MOST_FUSED_SIZE else "rows"


@contextlib.contextmanager
def force(form: Form) -> Iterator[None]:
    """Have every operator take this form in the block, in all threads: for tests and benchmarks.

    Raises:
        ValueError: there is no such form. An operator that lacks it at a shape raises when it is called.
    """
    global _forced
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    before, _forced = _forced, form
    _extension.forget_plans()
    try:
        yield
    finally:
        _forced = before
        _extension.forget_plans()


@contextlib.contextmanager
def slab_limit(limit: int) -> Iterator[None]:
    """Let the scratch of the ``rows`` form take at most so many bytes in the block, in all threads.

    Outside such a block it is 256 MB, or what ``FASTMETA_SLAB_MB`` says when fastmeta is imported.
    """
    global _slab_bytes
    before, _slab_bytes = _slab_bytes, limit
    _extension.forget_plans()
    try:
        yield
    finally:
        _slab_bytes = before
        _extension.forget_plans()


def slab_rows(n: int, bytes_per_row: int, least: int = 1) -> int:
    """Rows of a slab whose scratch stays within the limit: at least ``least``, a multiple of 16 where that many fit."""
    rows = max(least, _slab_bytes // max(bytes_per_row, 1))
    if rows >= n:
        return max(n, 1)
    return rows // 16 * 16 if rows >= 16 else rows
