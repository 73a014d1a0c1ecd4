"""The losses' row functions on tiles that hold whole rows: ``[rows, classes]`` in float32.

``csrc/losses.h`` has them for C++ and CUDA, ``fastmeta/losses.py`` in PyTorch with the table of formulas. Entries
beyond the C classes hold :func:`padding` in ``f`` and 0 in ``y`` and ``z``; what comes out there is not to be stored.
"""

import triton
import triton.language as tl

# The order of fastmeta.losses.LOSSES.
CROSS_ENTROPY: tl.constexpr = tl.constexpr(0)
BINARY_CROSS_ENTROPY: tl.constexpr = tl.constexpr(1)
MSE: tl.constexpr = tl.constexpr(2)
MSE_PROBS: tl.constexpr = tl.constexpr(3)


@triton.jit
def padding(loss: tl.constexpr):
    """The logit of an entry beyond the classes: of probability 0 where the loss has a softmax."""
    if loss == CROSS_ENTROPY or loss == MSE_PROBS:
        return float("-inf")
    else:
        return 0.0


@triton.jit
def softmax(f):
    """``p``; a row with NaN, +inf or nothing but -inf becomes NaN."""
    e = tl.exp(f - tl.max(f, 1)[:, None])
    return e / tl.sum(e, 1)[:, None]


@triton.jit
def sigmoid(f):
    """``1 / (1 + exp(-f))`` without overflow."""
    e = tl.exp(-tl.abs(f))
    return tl.where(f < 0, e, 1.0) / (1.0 + e)


@triton.jit
def softmax_jacobian(p, u):
    """``J u = p (u - <p, u>)``."""
    return p * (u - tl.sum(p * u, 1)[:, None])


@triton.jit
def residual(f, y, loss: tl.constexpr):
    """``r = dl/df``."""
    if loss == CROSS_ENTROPY:  # s p - y, s = sum(y)
        return tl.sum(y, 1)[:, None] * softmax(f) - y
    elif loss == BINARY_CROSS_ENTROPY:
        return sigmoid(f) - y
    elif loss == MSE:
        return 2.0 * (f - y)
    else:  # 2 J (p - y)
        p = softmax(f)
        return 2.0 * softmax_jacobian(p, p - y)


@triton.jit
def label_tangent(f, z, loss: tl.constexpr):
    """``t = D_z(-dl/dy)``."""
    if loss == CROSS_ENTROPY:
        return z - tl.sum(softmax(f) * z, 1)[:, None]
    elif loss == BINARY_CROSS_ENTROPY:
        return z
    elif loss == MSE:
        return 2.0 * z
    else:
        return 2.0 * softmax_jacobian(softmax(f), z)


@triton.jit
def curvature(f, z, loss: tl.constexpr):
    """``c = (d2l/df2) z`` for targets that sum to one; Gauss-Newton for ``mse_probs``."""
    if loss == CROSS_ENTROPY:
        return softmax_jacobian(softmax(f), z)
    elif loss == BINARY_CROSS_ENTROPY:
        e = tl.exp(-tl.abs(f))
        inverse = 1.0 / (1.0 + e)
        return e * inverse * inverse * z
    elif loss == MSE:
        return 2.0 * z
    else:
        p = softmax(f)
        return 2.0 * softmax_jacobian(p, softmax_jacobian(p, z))
