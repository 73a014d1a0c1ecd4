"""The label step of Meta-Gradient from two perturbed forward passes."""

import torch
from torch import Tensor

from fastmeta import checks
from fastmeta.dispatch import Operator, in_own_dtype, unnamed

OPERATOR = Operator(
    "finite_difference_labels",
    numbers=2,
    triton="finite_difference_labels",
    fake=lambda logits_plus, *rest: logits_plus.new_empty(logits_plus.shape),
)


def project_to_simplex_rows(labels: Tensor) -> Tensor:
    """Clip at 0 and divide by the row sum; a row left all 0 becomes uniform. ``[N, C]``."""
    clipped = labels.clamp_min(0)
    total = clipped.sum(-1, keepdim=True)
    uniform = torch.full_like(clipped, 1 / max(labels.shape[-1], 1))
    return torch.where(total == 0, uniform, clipped / torch.where(total == 0, torch.ones_like(total), total))


@in_own_dtype
def finite_difference_labels_reference(
    logits_plus: Tensor,  # [N, C]
    logits_minus: Tensor,  # [N, C]
    labels: Tensor,  # [N, C]
    epsilon: Tensor,  # []
    step: float,
    project: bool,
) -> Tensor:  # [N, C]
    """``y - step (softmax(f+) - softmax(f-)) / epsilon``, projected."""
    difference = logits_plus.softmax(-1) - logits_minus.softmax(-1)
    # A tensor without dimensions is divided by at full precision and leaves the dtype as it is.
    moved = labels - step * difference / epsilon.reshape(())
    return project_to_simplex_rows(moved) if project else moved


def finite_difference_labels(
    logits_plus: Tensor,
    logits_minus: Tensor,
    labels: Tensor,
    epsilon: Tensor | float,
    *,
    step: float,
    project: bool = True,
    impl: str | None = None,
) -> Tensor:
    r"""Labels after one step along the finite difference of the predictions.

    .. math:: \hat y = \tilde y - \text{step}\, \frac{\operatorname{softmax} f^+ - \operatorname{softmax} f^-}{\epsilon}

    with ``f+-`` the logits at ``theta +- epsilon grad L_labeled``: Meta-Gradient, Eq. (6) with (16), where
    ``step = alpha beta / B``. The quotient is twice the derivative in the limit; at the published radius it is a
    finite probe, not a derivative.

    Args:
        logits_plus: logits at ``theta + epsilon v``, ``[N, C]``.
        logits_minus: logits at ``theta - epsilon v``, ``[N, C]``.
        labels: the labels before the step, ``[N, C]``.
        epsilon: the factor of the direction; a tensor of one element stays on its device.
        step: size of the step.
        project: clip at 0 and divide by the row sum; a row left all 0 becomes uniform.
        impl: implementation to use; see :func:`fastmeta.use_impl`.

    Returns:
        ``[N, C]``.

    Raises:
        ValueError: a shape does not fit, or ``epsilon`` is a number and not > 0.
        TypeError: dtypes are not floating or not the same.
        RuntimeError: the named ``impl`` is not available.

    >>> import torch
    >>> f = torch.tensor([[1.0, 0.0]])
    >>> finite_difference_labels(f, -f, torch.tensor([[0.5, 0.5]]), 1.0, step=0.5)
    tensor([[0.2689, 0.7311]])
    """

    def check() -> None:
        checks.number(step, "step")
        plus = checks.matrix(logits_plus, "logits_plus", "[N, C]")
        minus = checks.shaped(logits_minus, "logits_minus", "[N, C]", plus.shape)
        y = checks.shaped(labels, "labels", "[N, C]", plus.shape)
        checks.like(plus, "logits_plus", logits_minus=minus, labels=y)
        if isinstance(epsilon, Tensor):
            if epsilon.numel() != 1 or not epsilon.is_floating_point():
                got = f"{str(epsilon.dtype).removeprefix('torch.')} {list(epsilon.shape)}"
                raise ValueError(f"epsilon must be a floating tensor of one element, got {got}")
            if epsilon.device != plus.device:
                raise ValueError(f"epsilon must be on {plus.device} like logits_plus, got {epsilon.device}")
        elif checks.number(epsilon, "epsilon", low=0.0) == 0:
            raise ValueError(f"epsilon must be > 0, got {epsilon}")

    if not isinstance(epsilon, Tensor):
        check()
        # Filled on the device: a copy from the host could not be captured in a CUDA graph.
        epsilon = torch.full((), epsilon, dtype=torch.float64, device=logits_plus.device)
    arguments = logits_plus, logits_minus, labels, epsilon, step, project
    if unnamed(impl):
        result = OPERATOR.entry(*arguments)
        if result is not NotImplemented:
            return result
    kernel = OPERATOR.select(impl, logits_plus, logits_minus, labels, epsilon)
    if kernel is not None:
        return checks.run(kernel, arguments, check)
    check()
    return finite_difference_labels_reference(logits_plus, logits_minus, labels, epsilon, step, project)
