"""Sums over a row's classes, tile by tile: an online softmax whose running sums give the result of a whole row.

With ``m`` the largest logit so far and ``e = exp(f - m)``, every sum is kept relative to ``m`` and scaled down when a
larger logit comes. A row whose logits are all -inf ends with ``sum e = 0`` and so with NaN, as its softmax does; NaN
and +inf among the logits make ``sum e`` NaN.
"""

import triton
import triton.language as tl


@triton.jit
def rise(top, candidate):
    """The larger of two maxima, what exponents are taken relative to, and the factors of the sums kept at each."""
    both = tl.maximum(top, candidate)
    reference = tl.where(both == float("-inf"), 0.0, both)  # a sum of nothing counts 0, not NaN
    return both, reference, tl.exp(top - reference), tl.exp(candidate - reference)


@triton.jit
def expected_tangent(top, e_sum, ez_sum, f, z):
    """One more tile ``[rows, classes]`` of ``sum e`` and ``sum e z``, whose quotient is ``<p, z>``."""
    top, reference, kept, _ = rise(top, tl.max(f, 1))
    e = tl.exp(f - reference[:, None])
    return top, e_sum * kept + tl.sum(e, 1), ez_sum * kept + tl.sum(e * z, 1)
