"""The direction of label gradient alignment, with its two running averages, in one pass over memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmeta import checks
from fastmeta.dispatch import Operator
from fastmeta.ops import _in_place

OPERATOR = Operator("alignment_direction_")
_VECTOR = 16  # bytes that a kernel stores at once
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
        impl: implementation to use; see :func:`fastmeta.use_impl`.

    Returns:
        New tensors, contiguous where the gradients are. They may be views of one allocation.

    Raises:
        ValueError: lengths or shapes differ, a number is out of range, or an average shares memory with another
            tensor.
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

    kernel = OPERATOR.select(impl, *(tensor for tensors in lists for tensor in tensors if isinstance(tensor, Tensor)))
    if kernel is None:
        check()
        with torch.no_grad():
            return alignment_direction_reference(*lists, decay, decay_norm, epsilon)
    directions = _outputs(lists[0])
    checks.run(kernel, (*lists, directions, decay, decay_norm, epsilon), check)
    _in_place.written(lists[2] + lists[3])
    return directions


def _outputs(grads: list[Tensor]) -> list[Tensor]:
    """Uninitialized tensors like the gradients; views of one allocation where that is simple."""
    tensors = [grad for grad in grads if isinstance(grad, Tensor)]  # anything else the kernel refuses
    with torch.no_grad():
        if len({grad.dtype for grad in tensors}) != 1 or not all(grad.is_contiguous() for grad in tensors):
            return [torch.empty_like(grad, requires_grad=False) for grad in tensors]
        # Behind a tensor of another size the next would lie where no vector can be stored.
        size = tensors[0].element_size()
        shared = [grad for grad in tensors if grad.numel() * size % _VECTOR == 0]
        flat = tensors[0].new_empty(sum(grad.numel() for grad in shared))
        views = iter(torch._utils._unflatten_dense_tensors(flat, shared))
        return [next(views) if grad.numel() * size % _VECTOR == 0 else grad.new_empty(grad.shape) for grad in tensors]


def _check(lists: tuple[list[Tensor], ...]) -> None:
    named = [
        [(f"{name}[{index}]", tensor) for index, tensor in enumerate(tensors)]
        for name, tensors in zip(_LISTS, lists, strict=True)
    ]
    for name, tensors in zip(_LISTS, lists, strict=True):
        if len(tensors) != len(lists[0]):
            raise ValueError(f"{name} must have {len(lists[0])} tensors like grads_labeled, got {len(tensors)}")
    for (name_l, g_l), (name_u, g_u), (name_m, m), (name_q, q) in zip(*named, strict=True):
        checks.floating(g_l, name_l)
        checks.shaped(g_u, name_u, f"the shape of {name_l}", g_l.shape)
        checks.like(g_l, name_l, **{name_u: g_u})
        _in_place.average(m, name_m, g_l, name_l)
        checks.shaped(q, name_q, f"the shape of {name_l}", g_l.shape)
        checks.like(m, name_m, **{name_q: q})
    _in_place.disjoint(named[2] + named[3], named[0] + named[1])
    _in_place.refuse_grad("alignment_direction", [tensor for tensors in lists for tensor in tensors])
