"""Masked Adam: an Adam step on the rows of a table that a batch touched, with statistics of their own."""

import torch
from torch import Tensor

from fastmeta import checks
from fastmeta.dispatch import Operator, in_place, unnamed
from fastmeta.ops import _in_place

OPERATOR = Operator("masked_adam_", numbers=6, fake=in_place)


def masked_adam_reference_(
    table: Tensor,  # [M] or [M, C]
    index: Tensor,  # [n]
    grad: Tensor,  # [n] or [n, C]
    exp_avg: Tensor,  # [M] or [M, C]
    exp_avg_sq: Tensor,  # [M] or [M, C]
    steps: Tensor,  # [M]
    lr: float,
    betas: tuple[float, float],
    eps: float,
    low: float | None,
    high: float | None,
    found_inf: Tensor | None = None,  # []
) -> None:
    """``m, v, t`` of the touched rows alone, then ``clip(w - lr m^ / (sqrt(v^) + eps))``."""
    wide = torch.float64 if table.dtype == torch.float64 else torch.float32
    # A repeated row is computed, and written, once for each time it comes: how many differ the host does not know, and
    # torch.unique would wait for a GPU to tell.
    rows, order = index.sort(stable=True)
    first = torch.ones_like(rows)
    first[1:] = rows[1:] != rows[:-1]
    place = first.cumsum(0) - 1
    g = torch.zeros(len(rows), *table.shape[1:], dtype=wide, device=table.device)
    g = g.index_add_(0, place, grad[order].to(wide))[place]
    t = steps[rows] + 1
    m = betas[0] * exp_avg[rows].to(wide) + (1 - betas[0]) * g
    v = betas[1] * exp_avg_sq[rows].to(wide) + (1 - betas[1]) * g * g
    # float64: 1 - beta^t has lost its digits in float32 while t is small.
    count = t.double().view(-1, *[1] * (table.dim() - 1))
    m_hat = m / (1 - betas[0] ** count).to(wide)
    v_hat = v / (1 - betas[1] ** count).to(wide)
    w = table[rows].to(wide) - lr * m_hat / (v_hat.sqrt() + eps)
    if low is not None or high is not None:
        w = w.clamp(low, high)
    for target, value in ((table, w), (exp_avg, m), (exp_avg_sq, v), (steps, t)):
        new = value.to(target.dtype)
        target[rows] = new if found_inf is None else torch.where(found_inf != 0, target[rows], new)


def masked_adam_(
    table: Tensor,
    index: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    low: float | None = None,
    high: float | None = None,
    found_inf: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    r"""Masked Adam step, in place on the rows ``index`` of a table; nothing else of it is touched.

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
        w \leftarrow \operatorname{clip}\Bigl(w - \text{lr}\,
        \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \text{eps}}\Bigr)

    with ``t`` the number of updates the row itself has had: M(asked)-Adam of Not All Unlabeled Data Are Equal,
    Section 3.3 and Appendix C. ``eps`` stands where :class:`torch.optim.Adam` has it, outside the corrected root;
    :class:`torch.optim.SparseAdam` adds it before the correction. A row repeated in ``index`` takes one step with the
    sum of its gradients, added in the order they come.

    Args:
        table: ``w``, ``[M]`` or ``[M, C]``; any strides.
        index: rows, int64 ``[n]``.
        grad: gradients of those rows, ``[n]`` or ``[n, C]``, in the table's dtype.
        exp_avg: ``m``, of the table's shape, in its dtype or float32.
        exp_avg_sq: ``v``, like ``exp_avg``.
        steps: ``t``, int32 ``[M]``.
        lr: learning rate.
        betas: decay rates ``(beta1, beta2)`` in [0, 1).
        eps: added to the denominator, >= 0.
        low: lower bound of the touched entries.
        high: upper bound of the touched entries.
        found_inf: a scalar on the table's device, 0 where the step is finite; else nothing is written, as a fused
            :class:`torch.optim.Adam` has it under a loss scaler. See :mod:`fastmeta.ops.found_inf`. A GPU is not
            waited for. None: the step is taken.
        impl: implementation to use; see :func:`fastmeta.use_impl`.

    Returns:
        ``table``.

    Raises:
        ValueError: a shape does not fit, a number is out of range, or arguments share memory.
        IndexError: a row is not in ``[0, M)``; nothing has been written. On the CPU: a GPU does not wait to look, and
            its kernel leaves the row out.
        TypeError: a dtype does not fit.
        RuntimeError: an argument requires grad outside ``torch.no_grad()``, or the named ``impl`` is not available.

    >>> weights, m, v, steps = torch.ones(3), torch.zeros(3), torch.zeros(3), torch.zeros(3, dtype=torch.int32)
    >>> masked_adam_(weights, torch.tensor([2, 0]), torch.tensor([0.5, -9.0]), m, v, steps, lr=0.1, high=1.05)
    tensor([1.0500, 1.0000, 0.9000])
    >>> steps
    tensor([1, 0, 1], dtype=torch.int32)
    """
    if found_inf is not None and table.is_cpu and bool(found_inf):
        _check(table, index, grad, exp_avg, exp_avg_sq, steps)
        return table
    given = index
    if found_inf is not None and not table.is_cpu:
        index = torch.where(found_inf != 0, -1, index)  # a GPU's kernel leaves out what is no row
    tensors = (table, index, grad, exp_avg, exp_avg_sq, steps)
    if unnamed(impl) and OPERATOR.entry(*tensors, lr, *betas, eps, low, high) is not NotImplemented:
        return table

    def check() -> None:
        _check(*tensors)
        checks.number(lr, "lr")
        for name, beta in zip(("betas[0]", "betas[1]"), betas, strict=True):
            if checks.number(beta, name, low=0.0, high=1.0) == 1.0:
                raise ValueError(f"{name} must be in [0, 1), got 1.0")
        checks.number(eps, "eps", low=0.0)
        bounds = [checks.number(bound, name) for name, bound in (("low", low), ("high", high)) if bound is not None]
        if len(bounds) == 2 and bounds[0] > bounds[1]:
            raise ValueError(f"low must be <= high = {high}, got {low}")

    kernel = OPERATOR.select(impl, *tensors)
    if kernel is None:
        check()
        with torch.no_grad():
            masked_adam_reference_(table, given, *tensors[2:], lr, betas, eps, low, high, found_inf)
        return table
    checks.run(kernel, (*tensors, lr, *betas, eps, low, high), check)
    _in_place.written((table, exp_avg, exp_avg_sq, steps))
    return table


def _check(table: Tensor, index: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, steps: Tensor) -> None:
    checks.floating(table, "table")
    if table.dim() not in (1, 2):
        raise ValueError(f"table must be [M] or [M, C], got {table.dim()}-D {list(table.shape)}")
    for name, tensor, dtype in (("index", index, torch.int64), ("steps", steps, torch.int32)):
        if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be {str(dtype)[6:]}, got {str(got).removeprefix('torch.')}")
        if tensor.device != table.device:
            raise ValueError(f"{name} must be on {table.device} like table, got {tensor.device}")
    rows, width = table.shape[0], tuple(table.shape[1:])
    if index.dim() != 1:
        raise ValueError(f"index must be 1-D [n], got {index.dim()}-D {list(index.shape)}")
    if tuple(steps.shape) != (rows,):
        raise ValueError(f"steps must be [M] = [{rows}], got {list(steps.shape)}")
    checks.shaped(grad, "grad", "[n, C]" if width else "[n]", (index.shape[0], *width))
    checks.like(table, "table", grad=grad)
    _in_place.average(exp_avg, "exp_avg", table, "table")
    checks.shaped(exp_avg_sq, "exp_avg_sq", "the shape of table", table.shape)
    checks.like(exp_avg, "exp_avg", exp_avg_sq=exp_avg_sq)
    _in_place.disjoint(
        [("table", table), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq), ("steps", steps)],
        [("index", index), ("grad", grad)],
    )
    # On a GPU the check would wait for the device.
    if index.is_cpu and index.numel() and not torch.compiler.is_compiling():
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= rows:
            raise IndexError(f"index must be rows in [0, {rows}), got {low if low < 0 else high}")
    _in_place.refuse_grad("masked_adam_", (table, grad, exp_avg, exp_avg_sq))
