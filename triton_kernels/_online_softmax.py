"""Sums over a row's classes, tile by tile: an online softmax whose running sums give the result of a whole row.

With ``m`` the largest logit so far and ``e = exp(f - m)``, every sum is kept relative to ``m`` and scaled down when a
larger logit comes. A row whose logits are all -inf ends with ``sum e = 0`` and so with NaN, as its softmax does; NaN
and +inf among the logits make ``sum e`` NaN.
"""

import triton
import triton.language as tl


@triton.jit
def finite(top):
    """What exponents are taken relative to: a sum of nothing counts 0, not NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def rise(top, f):
    """The maximum with one more tile ``[rows, classes]``; what exponents are relative to; the factor of older sums."""
    both = tl.maximum(top, tl.max(f, 1))
    reference = finite(both)
    return both, reference, tl.exp(top - reference)


@triton.jit
def shares_scale(top):
    """Factors that bring the sums of several shares of the classes to their common maximum. ``[rows, shares]``."""
    return tl.exp(top - finite(tl.max(top, 1))[:, None])
