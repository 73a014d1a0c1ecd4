"""The losses' row functions in two steps: sums over a row's classes, tile by tile, and what they make of an entry.

``csrc/losses.h`` has the row functions for C++ and CUDA, ``fastmeta/losses.py`` in PyTorch with the table of formulas.
A loss without a softmax has ``pointwise_residual``, ``pointwise_label_tangent`` and ``pointwise_curvature``, and
one sum: ``yz``, of the residual times z. The sums of a softmax, with ``m`` the largest logit so far and
``e = exp(f - m)``, are

    top     m                                         ez      e z
    e       e                                         ee      e e
    y       y for cross_entropy, e y for mse_probs    eez     e e z
    yz      y z for cross_entropy, e y z for mse_probs

each scaled down when a larger logit comes. A row whose logits are all -inf ends with ``e = 0`` and so with NaN, as its
softmax does; NaN and +inf among the logits make ``e`` NaN. Tiles are ``[rows, ..., entries]``: the last axis is summed
over, and the sums have the axes before it, so that no thread needs another's entries until :func:`joined`.
"""

import triton
import triton.language as tl

from fastmeta.losses import BY_CODE, LOSSES

CROSS_ENTROPY: tl.constexpr = tl.constexpr(LOSSES["cross_entropy"])
BINARY_CROSS_ENTROPY: tl.constexpr = tl.constexpr(LOSSES["binary_cross_entropy"])
MSE: tl.constexpr = tl.constexpr(LOSSES["mse"])
MSE_PROBS: tl.constexpr = tl.constexpr(LOSSES["mse_probs"])
MSE_TANH: tl.constexpr = tl.constexpr(LOSSES["mse_tanh"])
HUBER: tl.constexpr = tl.constexpr(LOSSES["huber"])
# Triton compares the globals of a kernel with copies of them at every call: plain values, no objects.
_HAS_SOFTMAX = tuple(loss.has_softmax for loss in BY_CODE)
_LABEL_TANGENT_READS_TARGETS = tuple(loss.label_tangent_reads_targets for loss in BY_CODE)
_CURVATURE_READS_TARGETS = tuple(loss.curvature_reads_targets for loss in BY_CODE)
# What a row becomes.
DOT: tl.constexpr = tl.constexpr(0)  # <r, z>
LABEL_TANGENT: tl.constexpr = tl.constexpr(1)
RESIDUAL: tl.constexpr = tl.constexpr(2)
CURVATURE: tl.constexpr = tl.constexpr(3)


@triton.constexpr_function
def has_softmax(loss):
    """Whether a row's entries depend on each other."""
    return _HAS_SOFTMAX[loss]


@triton.constexpr_function
def reads_targets(loss, function):
    """Whether what a row becomes depends on its targets."""
    if function == LABEL_TANGENT:
        return _LABEL_TANGENT_READS_TARGETS[loss]
    return function != CURVATURE or _CURVATURE_READS_TARGETS[loss]


@triton.jit
def padding(loss: tl.constexpr):
    """The logit of an entry beyond the classes: of probability 0 where the loss has a softmax."""
    if has_softmax(loss):
        return float("-inf")
    else:
        return 0.0


@triton.jit
def finite(top):
    """The maximum that exponents are relative to; 0 in place of -inf, so that an empty sum is 0, not NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def sigmoid(f):
    """``1 / (1 + exp(-f))`` without overflow."""
    e = tl.exp(-tl.abs(f))
    return tl.where(f < 0, e, 1.0) / (1.0 + e)


@triton.jit
def hit(label, num_classes):
    """1, or NaN for a class that does not exist: raising an error would have to wait for the GPU."""
    return tl.where((label >= 0) & (label < num_classes), 1.0, float("nan"))


@triton.jit
def tanh(f):
    """As in ``csrc/losses.h``: ``1 - exp(-2 |f|)`` cancels for small f, and there it is a continued fraction."""
    e = tl.exp(-2.0 * tl.abs(f))
    square = f * f
    top = f * (((square + 378.0) * square + 17325.0) * square + 135135.0)
    bottom = ((28.0 * square + 3150.0) * square + 62370.0) * square + 135135.0
    is_small = tl.abs(f) < 0.5
    return tl.where(is_small, top, tl.where(f < 0, e - 1.0, 1.0 - e)) / tl.where(is_small, bottom, 1.0 + e)


@triton.jit
def tanh_slope(f):
    """``1 - tanh(f)^2``."""
    t = tanh(f)
    return 1.0 - t * t


@triton.jit
def huber_residual(gap):
    """``clamp(gap, -1, 1)``; NaN stays."""
    return tl.where(gap > 1.0, 1.0, tl.where(gap < -1.0, -1.0, gap))


@triton.jit
def huber_slope(gap):
    """``1[|gap| <= 1]``; NaN stays."""
    r = huber_residual(gap)
    return tl.where(gap == r, 1.0, r - r)


@triton.jit
def pointwise_residual(f, y, loss: tl.constexpr):
    """``r`` of the losses without a softmax."""
    if loss == BINARY_CROSS_ENTROPY:
        return sigmoid(f) - y
    elif loss == MSE_TANH:
        t = tanh(f)
        return 2.0 * (t - tanh(y)) * (1.0 - t * t)
    elif loss == HUBER:
        return huber_residual(f - y)
    else:
        tl.static_assert(loss == MSE)
        return 2.0 * (f - y)


@triton.jit
def pointwise_label_tangent(f, y, z, loss: tl.constexpr):
    """``t(z)`` of the losses without a softmax."""
    if loss == BINARY_CROSS_ENTROPY:
        return z
    elif loss == MSE_TANH:
        return 2.0 * tanh_slope(y) * tanh_slope(f) * z
    elif loss == HUBER:
        return huber_slope(f - y) * z
    else:
        tl.static_assert(loss == MSE)
        return 2.0 * z


@triton.jit
def pointwise_curvature(f, y, z, loss: tl.constexpr):
    """``c(z)`` of the losses without a softmax."""
    if loss == BINARY_CROSS_ENTROPY:
        e = tl.exp(-tl.abs(f))
        inverse = 1.0 / (1.0 + e)
        return e * inverse * inverse * z
    elif loss == MSE_TANH:
        slope = tanh_slope(f)
        return 2.0 * slope * slope * z
    elif loss == HUBER:
        return huber_slope(f - y) * z
    else:
        tl.static_assert(loss == MSE)
        return 2.0 * z


@triton.jit
def added(top, e_sum, y_sum, yz, ez, ee, eez, f, y, z, loss: tl.constexpr, function: tl.constexpr):
    """The sums with one more tile; those that the row function does not need stay as they are."""
    if has_softmax(loss):
        axis: tl.constexpr = len(f.shape) - 1
        higher = tl.maximum(top, tl.max(f, axis))
        reference = finite(higher)
        kept = tl.exp(top - reference)
        e = tl.exp(f - tl.expand_dims(reference, axis))
        top = higher
        e_sum = e_sum * kept + tl.sum(e, axis)
        if function != RESIDUAL:
            ez = ez * kept + tl.sum(e * z, axis)
        if function == DOT or function == RESIDUAL:
            if loss == CROSS_ENTROPY:
                y_sum += tl.sum(y, axis)
            else:
                y_sum = y_sum * kept + tl.sum(e * y, axis)
        if function == DOT:
            if loss == CROSS_ENTROPY:
                yz += tl.sum(y * z, axis)
            else:
                yz = yz * kept + tl.sum(e * y * z, axis)
        if loss == MSE_PROBS and function != LABEL_TANGENT:
            ee = ee * kept * kept + tl.sum(e * e, axis)
            if function != RESIDUAL:
                eez = eez * kept * kept + tl.sum(e * e * z, axis)
    elif function == DOT:
        yz += tl.sum(pointwise_residual(f, y, loss) * z, len(f.shape) - 1)
    return top, e_sum, y_sum, yz, ez, ee, eez


@triton.jit
def joined(top, e_sum, y_sum, yz, ez, ee, eez, loss: tl.constexpr, function: tl.constexpr):
    """The running sums, added up over their last axis: the one exchange between threads, once a row."""
    if has_softmax(loss):
        axis: tl.constexpr = len(top.shape) - 1
        highest = tl.max(top, axis)
        scale = tl.exp(top - tl.expand_dims(finite(highest), axis))
        top = highest
        e_sum = tl.sum(e_sum * scale, axis)
        if function != RESIDUAL:
            ez = tl.sum(ez * scale, axis)
        if function == DOT or function == RESIDUAL:
            y_sum = tl.sum(y_sum if loss == CROSS_ENTROPY else y_sum * scale, axis)
        if function == DOT:
            yz = tl.sum(yz if loss == CROSS_ENTROPY else yz * scale, axis)
        if loss == MSE_PROBS and function != LABEL_TANGENT:
            ee = tl.sum(ee * scale * scale, axis)
            if function != RESIDUAL:
                eez = tl.sum(eez * scale * scale, axis)
    elif function == DOT:
        yz = tl.sum(yz, len(yz.shape) - 1)
    return top, e_sum, y_sum, yz, ez, ee, eez


@triton.jit
def dot_of_sums(e_sum, y_sum, yz, ez, ee, eez, loss: tl.constexpr):
    """``<r, z>`` of a row."""
    if loss == CROSS_ENTROPY:
        return y_sum * (ez / e_sum) - yz
    elif loss == MSE_PROBS:
        return 2.0 * ((eez / e_sum - yz) - (ee / e_sum - y_sum) * (ez / e_sum)) / e_sum
    else:
        return yz


@triton.jit
def entries(f, y, z, top, e_sum, y_sum, ez, ee, eez, loss: tl.constexpr, function: tl.constexpr):
    """The row function's entries ``[rows, ..., entries]``, from sums with as many axes."""
    if has_softmax(loss):
        inverse = 1.0 / e_sum
        if function == LABEL_TANGENT:
            r = z - ez * inverse
            if loss == MSE_PROBS:
                r *= 2.0 * inverse * tl.exp(f - top)
        else:
            p = tl.exp(f - top) * inverse
            if function == CURVATURE:
                mean = ez * inverse  # <p, z>
                r = p * (z - mean)
                if loss == MSE_PROBS:
                    r = 2.0 * p * (r - inverse * inverse * (eez - mean * ee))
            elif loss == CROSS_ENTROPY:
                r = y_sum * p - y
            else:
                r = 2.0 * p * (p - y - inverse * (inverse * ee - y_sum))
    elif function == RESIDUAL:
        r = pointwise_residual(f, y, loss)
    elif function == LABEL_TANGENT:
        r = pointwise_label_tangent(f, y, z, loss)
    else:
        r = pointwise_curvature(f, y, z, loss)
    return r
