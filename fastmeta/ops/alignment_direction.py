"""The direction of label gradient alignment, with its two running averages, in one pass over memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmeta import checks
from fastmeta.dispatch import Operator
from fastmeta.ops import _in_place

OPERATOR = Operator("alignment_direction_")
_LISTS = ("grads_labeled", "grads_unlabeled", "ema_labeled", "ema_fourth")


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
        directions.append((2 * v / (epsilon + fourth.sqrt())).to(m.dtype).contiguous())
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
        ema_labeled: ``m``, updated in place.
        ema_fourth: ``q``, updated in place.
        decay: ``d`` in [0, 1].
        decay_norm: ``d'`` in [0, 1].
        epsilon: added to the denominator, >= 0.
        impl: implementation to use; see :func:`fastmeta.use_impl`.

    Returns:
        New contiguous tensors of the same shapes. Those of one dtype may be views of one allocation.

    Raises:
        ValueError: lengths or shapes differ, a number is out of range, or averages share memory with another argument.
        TypeError: dtypes are not floating or not the same.
        RuntimeError: an argument requires grad outside ``torch.no_grad()``, or the named ``impl`` is not available.

    >>> mean, fourth = torch.zeros(2), torch.zeros(2)
    >>> labeled, unlabeled = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 1.0])
    >>> alignment_direction([labeled], [unlabeled], [mean], [fourth], decay=0.5, decay_norm=0.0, epsilon=1.0)
    [tensor([ 1., -1.])]
    >>> mean
    tensor([1., 0.])
    """
    lists = list(grads_labeled), list(grads_unlabeled), list(ema_labeled), list(ema_fourth)

    def check() -> None:
        _check(lists)
        checks.number(decay, "decay", low=0.0, high=1.0)
        checks.number(decay_norm, "decay_norm", low=0.0, high=1.0)
        checks.number(epsilon, "epsilon", low=0.0)

    check()
    with torch.no_grad():
        return alignment_direction_reference(*lists, decay, decay_norm, epsilon)


def _check(lists: tuple[list[Tensor], ...]) -> None:
    for name, tensors in zip(_LISTS, lists, strict=True):
        if len(tensors) != len(lists[0]):
            raise ValueError(f"{name} must have {len(lists[0])} tensors like grads_labeled, got {len(tensors)}")
        for index, (tensor, first) in enumerate(zip(tensors, lists[0], strict=True)):
            checks.floating(first, f"grads_labeled[{index}]")
            checks.shaped(tensor, f"{name}[{index}]", f"the shape of grads_labeled[{index}]", first.shape)
            checks.like(first, f"grads_labeled[{index}]", **{f"{name}[{index}]": tensor})
    named = [
        [(f"{name}[{index}]", tensor) for index, tensor in enumerate(tensors)]
        for name, tensors in zip(_LISTS, lists, strict=True)
    ]
    _in_place.disjoint(named[2] + named[3], named[0] + named[1])
    _in_place.refuse_grad("alignment_direction", [tensor for tensors in lists for tensor in tensors])
