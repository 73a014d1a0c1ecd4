"""The direction of label gradient alignment, with its two running averages, in one pass over memory."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmeta import checks
from fastmeta.dispatch import Operator, in_place
from fastmeta.ops import _in_place, _lists

OPERATOR = Operator("alignment_direction_", fake=in_place)
_LISTS = ("grads_labeled", "grads_unlabeled", "ema_labeled", "ema_fourth", "out")


def alignment_direction_reference(
    grads_labeled: Sequence[Tensor],
    grads_unlabeled: Sequence[Tensor],
    ema_labeled: Sequence[Tensor],
    ema_fourth: Sequence[Tensor],
    decay: float,
    decay_norm: float,
    epsilon: float,
) -> list[Tensor]:
    """``m <- d m + (1 - d) g_l;  v = m - g_u;  q <- d' q + (1 - d') v^4;  2 v / (epsilon + sqrt(q))``."""
    directions = []
    for g_l, g_u, m, q in zip(grads_labeled, grads_unlabeled, ema_labeled, ema_fourth, strict=True):
        # Rounded once, when it is stored: v^4 leaves the range of float16 early.
        wide = torch.float64 if m.dtype == torch.float64 else torch.float32
        mean = decay * m.to(wide) + (1 - decay) * g_l.to(wide)
        v = mean - g_u.to(wide)
        fourth = decay_norm * q.to(wide) + (1 - decay_norm) * v**4
        m.copy_(mean)
        q.copy_(fourth)
        directions.append(torch.empty_like(g_l).copy_(2 * v / (epsilon + fourth.sqrt())))
    return directions


def alignment_direction(
    grads_labeled: Sequence[Tensor],
    grads_unlabeled: Sequence[Tensor],
    ema_labeled: Sequence[Tensor],
    ema_fourth: Sequence[Tensor],
    *,
    decay: float,
    decay_norm: float,
    epsilon: float,
    out: Sequence[Tensor] | None = None,
    found_inf: Tensor | None = None,
    impl: str | None = None,
) -> list[Tensor]:
    r"""Gradient of the normalized distance between labeled and unlabeled gradients; updates both averages in place.

    .. math::
        m \leftarrow d\, m + (1 - d)\, g_\ell, \quad v = m - g_u, \quad q \leftarrow d' q + (1 - d')\, v^4, \quad
        \text{direction} = \frac{2 v}{\varepsilon + \sqrt{q}}

    the derivative of the distance of Label Gradient Alignment, Eq. (2), by ``v`` with its denominator held constant
    (Algorithm 1).

    Args:
        grads_labeled: ``g_l``, one tensor for each parameter.
        grads_unlabeled: ``g_u``, of the same shapes.
        ema_labeled: ``m``, updated in place; in the gradients' dtype, or float32 beside 16-bit ones.
        ema_fourth: ``q``, updated in place, like ``m``. In float16 it overflows from ``|v|`` = 16.
        decay: ``d`` in [0, 1].
        decay_norm: ``d'`` in [0, 1].
        epsilon: added to the denominator, >= 0.
        out: where the directions are written, tensors like the gradients that share memory with no other argument;
            None: into new memory.
        found_inf: a scalar of the gradients' device, 0 where they are finite; else the averages stay as they are and
            the directions are NaN. See :mod:`fastmeta.ops.found_inf`. A GPU is not waited for. None: as if 0.
        impl: implementation to use; see :func:`fastmeta.use_impl`.

    Returns:
        The tensors of ``out``; else new ones, contiguous where the gradients are, which may lie in one allocation.

    Raises:
        ValueError: lengths or shapes differ, a number is out of range, or a tensor that is written shares memory with
            another one.
        TypeError: dtypes are not floating or not the same.
        RuntimeError: an argument requires grad outside ``torch.no_grad()``, or the named ``impl`` is not available.

    >>> mean, fourth = torch.zeros(2), torch.zeros(2)
    >>> labeled, unlabeled = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 1.0])
    >>> alignment_direction([labeled], [unlabeled], [mean], [fourth], decay=0.5, decay_norm=0.0, epsilon=1.0)
    [tensor([ 1., -1.])]
    >>> mean
    tensor([1., 0.])
    """
    lists = [list(grads_labeled), list(grads_unlabeled), list(ema_labeled), list(ema_fourth)]
    if found_inf is not None:
        return _guarded(found_inf, lists, out, decay=decay, decay_norm=decay_norm, epsilon=epsilon, impl=impl)
    given = None if out is None else list(out)
    unseen = _lists.unseen(impl)
    if unseen is not None:
        kernels, named = unseen
        found: list[Tensor] | None = kernels.align(named, *lists, given, decay, decay_norm, epsilon)
        if found is not None:
            return found
    checked = lists if given is None else [*lists, given]

    def check() -> None:
        _check(checked)
        checks.number(decay, "decay", low=0.0, high=1.0)
        checks.number(decay_norm, "decay_norm", low=0.0, high=1.0)
        checks.number(epsilon, "epsilon", low=0.0)

    kernel = OPERATOR.select(impl, *(tensor for tensors in checked for tensor in tensors if isinstance(tensor, Tensor)))
    if kernel is None:
        check()
        g_l, g_u, m, q = lists
        with torch.no_grad():
            new = alignment_direction_reference(g_l, g_u, m, q, decay, decay_norm, epsilon)
            if given is None:
                return new
            for place, direction in zip(given, new, strict=True):
                place.copy_(direction)
        return given
    if given is None:  # what is not a tensor the kernel refuses
        directions = [torch.empty_like(g, requires_grad=False) for g in lists[0] if isinstance(g, Tensor)]
    else:
        directions = given
    checks.run(kernel, (*lists, directions, decay, decay_norm, epsilon), check)
    _in_place.written(lists[2] + lists[3] + (given or []))
    return directions


def _guarded(
    found_inf: Tensor, lists: list[list[Tensor]], out: Sequence[Tensor] | None, **options: Any
) -> list[Tensor]:
    """The call with ``found_inf``."""
    averages = lists[2] + lists[3]
    if found_inf.is_cpu and not torch.compiler.is_compiling():
        if not bool(found_inf):
            return alignment_direction(*lists, out=out, **options)
        _check(lists if out is None else [*lists, list(out)])
        directions = [torch.empty_like(g, requires_grad=False) for g in lists[0]] if out is None else list(out)
        torch._foreach_zero_(directions)
        torch._foreach_add_(directions, torch.nan)
        return directions
    kept = [average.clone() for average in averages]
    directions = alignment_direction(*lists, out=out, **options)
    found = found_inf != 0
    for average, before in zip(averages, kept, strict=True):
        average.copy_(torch.where(found, before, average))
    for direction in directions:
        direction.copy_(torch.where(found, torch.nan, direction))
    return directions


def _check(lists: list[list[Tensor]]) -> None:
    """Of the four lists, and of ``out`` where it is given."""
    named = [
        [(f"{name}[{index}]", tensor) for index, tensor in enumerate(tensors)]
        for name, tensors in zip(_LISTS, lists, strict=False)
    ]
    for name, tensors in zip(_LISTS, lists, strict=False):
        if len(tensors) != len(lists[0]):
            raise ValueError(f"{name} must have {len(lists[0])} tensors like grads_labeled, got {len(tensors)}")
    for (name_l, g_l), (name_u, g_u), (name_m, m), (name_q, q), *out in zip(*named, strict=True):
        checks.floating(g_l, name_l)
        checks.shaped(g_u, name_u, f"the shape of {name_l}", g_l.shape)
        checks.like(g_l, name_l, **{name_u: g_u})
        _in_place.average(m, name_m, g_l, name_l)
        checks.shaped(q, name_q, f"the shape of {name_l}", g_l.shape)
        checks.like(m, name_m, **{name_q: q})
        for name, tensor in out:
            checks.shaped(tensor, name, f"the shape of {name_l}", g_l.shape)
            checks.like(g_l, name_l, **{name: tensor})
    _in_place.disjoint([pair for written in named[2:] for pair in written], named[0] + named[1])
    _in_place.refuse_grad("alignment_direction", [tensor for tensors in lists for tensor in tensors])
