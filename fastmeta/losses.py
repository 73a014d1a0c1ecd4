"""The losses: their definition, and the three row functions every operator is made of.

Each function maps ``[N, C]`` rows to ``[N, C]`` rows in plain, differentiable PyTorch. ``f`` are logits, ``y`` targets,
``z`` a logit tangent, ``p`` the prediction, ``t = tanh f``, ``u = tanh y``.

=====================  ========================  ==========================  ===================================
loss                   residual ``dl/df``        label tangent               curvature ``(d2l/df2) z``
=====================  ========================  ==========================  ===================================
cross_entropy          ``s p - y, s = sum y``    ``z - <p, z>``              ``p (z - <p, z>)``
binary_cross_entropy   ``sigmoid(f) - y``        ``z``                       ``p (1 - p) z``
mse                    ``2 (f - y)``             ``2 z``                     ``2 z``
mse_probs              ``2 J (p - y)``           ``2 J z``                   ``2 J (J z)`` (Gauss-Newton)
mse_tanh               ``2 (t - u) (1 - t^2)``   ``2 (1 - u^2) (1 - t^2) z`` ``2 (1 - t^2)^2 z`` (Gauss-Newton)
huber                  ``clamp(f - y, -1, 1)``   ``1[|f - y| <= 1] z``       ``1[|f - y| <= 1] z``
=====================  ========================  ==========================  ===================================

``J u = p (u - <p, u>)`` is the softmax Jacobian. ``mse_probs`` is ``sum_c (p - y)^2``; ``mse_tanh`` is
``sum_c (tanh f - tanh y)^2``, the inner loss of the landmarks in Learning to Impute; ``huber`` is
``torch.nn.functional.huber_loss``, with ``delta = 1``.

All that is known of a loss is here, in ``csrc/loss.h`` and ``csrc/losses.h`` for C++ and CUDA, and in
``triton_kernels/_row_functions.py``. Everything else asks for the properties of a :class:`Loss`, never for its name.
"""

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class OutputCurvature(NamedTuple):
    """``C_i = diag(d_i) - s_i p_i^T - p_i s_i^T`` of every example; ``s`` and ``p`` are None where it is diagonal."""

    diagonal: Tensor  # d [N, C]
    s: Tensor | None = None  # [N, C]
    p: Tensor | None = None  # [N, C]


class Loss:
    """What a loss is, and what the kernels, the solvers and the problems ask of it.

    This class is the common case: the entries of a row do not depend on each other, and the logits are the prediction.
    Targets are None where they are not read.
    """

    has_softmax: ClassVar[bool] = False
    """whether the entries of a row depend on each other"""
    exact: ClassVar[bool] = True
    """whether the curvature is the second derivative itself, not its Gauss-Newton part"""
    label_slope: ClassVar[float | None] = None
    """``t(z) = label_slope z``, whatever the logits"""
    curvature_slope: ClassVar[float | None] = None
    """``c(z) = curvature_slope z``, whatever the logits"""
    label_tangent_reads_targets: ClassVar[bool] = False
    curvature_reads_targets: ClassVar[bool] = False

    def prediction(self, f: Tensor) -> Tensor:
        """What is compared with the targets. ``[N, C]``."""
        return f

    def per_example(self, f: Tensor, y: Tensor) -> Tensor:
        """The definition. ``[N]``."""
        raise NotImplementedError

    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        """``dl/df``. ``[N, C]``."""
        raise NotImplementedError

    def label_pull(self, f: Tensor, y: Tensor | None) -> Tensor:
        """``-dl/dy`` up to a constant. ``[N, C]``."""
        raise NotImplementedError

    def label_tangent(self, f: Tensor, y: Tensor | None, z: Tensor) -> Tensor:
        """``t(z) = D_z(-dl/dy)``. ``[N, C]``."""
        raise NotImplementedError

    def diagonal(self, f: Tensor, y: Tensor | None) -> Tensor:
        """The factor of z in the curvature of a loss without a softmax. ``[N, C]``."""
        raise NotImplementedError

    def curvature(self, f: Tensor, y: Tensor | None, z: Tensor) -> Tensor:
        """``c(z)``. ``[N, C]``."""
        return self.diagonal(f, y) * z

    def curvature_scale(self, y: Tensor) -> Tensor | None:
        """Factor of the curvature that depends on the targets alone, ``[N]``; None means 1."""
        return None

    def residual_tangent(self, f: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """``(d2l/df2) z``, exact. ``[N, C]``."""
        return self.curvature(f, y, z)

    def output_curvature(self, f: Tensor, y: Tensor | None) -> OutputCurvature:
        """The curvature as a diagonal and a matrix of low rank."""
        return OutputCurvature(self.diagonal(f, y))

    def fixed_curvature(self, f: Tensor, y: Tensor | None, weights: Tensor | None) -> Callable[[Tensor], Tensor]:
        """The function ``z -> w c(z)`` at fixed logits, weights ``[N]`` or 1; it returns a new tensor at each call."""
        factor = _times(weights, self.diagonal(f, y))
        return lambda z: factor * z


class _CrossEntropy(Loss):
    """``-<y, log softmax(f)>``; the curvature assumes targets that sum to one."""

    has_softmax = True

    def prediction(self, f: Tensor) -> Tensor:
        return f.softmax(dim=-1)

    def per_example(self, f: Tensor, y: Tensor) -> Tensor:
        return -(y * f.log_softmax(dim=-1)).sum(-1)

    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        return y.sum(-1, keepdim=True) * self.prediction(f) - y

    def label_pull(self, f: Tensor, y: Tensor | None) -> Tensor:
        return f.log_softmax(dim=-1)

    def label_tangent(self, f: Tensor, y: Tensor | None, z: Tensor) -> Tensor:
        return z - (self.prediction(f) * z).sum(-1, keepdim=True)

    def curvature(self, f: Tensor, y: Tensor | None, z: Tensor) -> Tensor:
        return softmax_jacobian(self.prediction(f), z)

    def curvature_scale(self, y: Tensor) -> Tensor | None:
        return y.sum(-1)

    def residual_tangent(self, f: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return y.sum(-1, keepdim=True) * self.curvature(f, y, z)

    def output_curvature(self, f: Tensor, y: Tensor | None) -> OutputCurvature:
        p = self.prediction(f)
        return OutputCurvature(p, p / 2, p)

    def fixed_curvature(self, f: Tensor, y: Tensor | None, weights: Tensor | None) -> Callable[[Tensor], Tensor]:
        p = self.prediction(f)
        factor = _times(weights, p)
        return lambda z: _centered(p, factor * z)


class _BinaryCrossEntropy(Loss):
    """C independent binary labels in each row."""

    label_slope = 1.0

    def prediction(self, f: Tensor) -> Tensor:
        return f.sigmoid()

    def per_example(self, f: Tensor, y: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(f, y, reduction="none").sum(-1)

    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        return f.sigmoid() - y

    def label_pull(self, f: Tensor, y: Tensor | None) -> Tensor:
        return f

    def label_tangent(self, f: Tensor, y: Tensor | None, z: Tensor) -> Tensor:
        return z

    def diagonal(self, f: Tensor, y: Tensor | None) -> Tensor:
        p = f.sigmoid()
        return p * (1 - p)


class _Mse(Loss):
    """``|f - y|^2``."""

    label_slope = 2.0
    curvature_slope = 2.0

    def per_example(self, f: Tensor, y: Tensor) -> Tensor:
        return (f - y).square().sum(-1)

    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        return 2 * (f - y)

    def label_pull(self, f: Tensor, y: Tensor | None) -> Tensor:
        return 2 * f

    def label_tangent(self, f: Tensor, y: Tensor | None, z: Tensor) -> Tensor:
        return 2 * z

    def diagonal(self, f: Tensor, y: Tensor | None) -> Tensor:
        return torch.full_like(f, 2.0)

    def curvature(self, f: Tensor, y: Tensor | None, z: Tensor) -> Tensor:
        return 2 * z


class _MseProbs(Loss):
    """``|softmax(f) - y|^2``."""

    has_softmax = True
    exact = False

    def prediction(self, f: Tensor) -> Tensor:
        return f.softmax(dim=-1)

    def per_example(self, f: Tensor, y: Tensor) -> Tensor:
        return (self.prediction(f) - y).square().sum(-1)

    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        p = self.prediction(f)
        return 2 * softmax_jacobian(p, p - y)

    def label_pull(self, f: Tensor, y: Tensor | None) -> Tensor:
        return 2 * self.prediction(f)

    def label_tangent(self, f: Tensor, y: Tensor | None, z: Tensor) -> Tensor:
        return 2 * softmax_jacobian(self.prediction(f), z)

    def curvature(self, f: Tensor, y: Tensor | None, z: Tensor) -> Tensor:
        p = self.prediction(f)
        return 2 * softmax_jacobian(p, softmax_jacobian(p, z))

    def residual_tangent(self, f: Tensor, y: Tensor, z: Tensor) -> Tensor:
        p = self.prediction(f)
        gap, moved = p - y, softmax_jacobian(p, z)
        mean = (p * gap).sum(-1, keepdim=True)
        return 2 * (softmax_jacobian(p, moved) + moved * (gap - mean) - p * (moved * gap).sum(-1, keepdim=True))

    def output_curvature(self, f: Tensor, y: Tensor | None) -> OutputCurvature:
        # 2 J J = 2 diag(p^2) - s p^T - p s^T with s = 2 p^2 - |p|^2 p.
        p = self.prediction(f)
        square = p.square()
        return OutputCurvature(2 * square, 2 * square - square.sum(1, keepdim=True) * p, p)

    def fixed_curvature(self, f: Tensor, y: Tensor | None, weights: Tensor | None) -> Callable[[Tensor], Tensor]:
        p = self.prediction(f)
        factor = _times(weights, 2 * p)
        return lambda z: _centered(p, factor * _centered(p, p * z))


class _MseTanh(Loss):
    """``|tanh f - tanh y|^2``."""

    exact = False
    label_tangent_reads_targets = True

    def per_example(self, f: Tensor, y: Tensor) -> Tensor:
        return (f.tanh() - y.tanh()).square().sum(-1)

    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        t = f.tanh()
        return 2 * (t - y.tanh()) * (1 - t * t)

    def label_pull(self, f: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        return 2 * (1 - y.tanh().square()) * f.tanh()

    def label_tangent(self, f: Tensor, y: Tensor | None, z: Tensor) -> Tensor:
        assert y is not None
        return 2 * (1 - y.tanh().square()) * (1 - f.tanh().square()) * z

    def diagonal(self, f: Tensor, y: Tensor | None) -> Tensor:
        return 2 * (1 - f.tanh().square()).square()

    def residual_tangent(self, f: Tensor, y: Tensor, z: Tensor) -> Tensor:
        t = f.tanh()
        slope = 1 - t * t
        return (2 * slope * slope - 4 * (t - y.tanh()) * t * slope) * z


class _Huber(Loss):
    """``(f - y)^2 / 2`` up to a difference of 1, and ``|f - y| - 1/2`` beyond."""

    label_tangent_reads_targets = True
    curvature_reads_targets = True

    def per_example(self, f: Tensor, y: Tensor) -> Tensor:
        r = self.residual(f, y)
        return (r * (f - y - r / 2)).sum(-1)

    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        return (f - y).clamp(-1, 1)

    def label_pull(self, f: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        return self.residual(f, y)

    def label_tangent(self, f: Tensor, y: Tensor | None, z: Tensor) -> Tensor:
        return self.diagonal(f, y) * z

    def diagonal(self, f: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        gap, r = f - y, self.residual(f, y)
        return torch.where(gap == r, 1, r - r)  # 1 or 0; NaN where the difference is NaN


# In the order of the kernels' enum, csrc/loss.h (tests/test_losses.py compares the two).
_TABLE: dict[str, Loss] = {
    "cross_entropy": _CrossEntropy(),
    "binary_cross_entropy": _BinaryCrossEntropy(),
    "mse": _Mse(),
    "mse_probs": _MseProbs(),
    "mse_tanh": _MseTanh(),
    "huber": _Huber(),
}
LOSSES: dict[str, int] = {name: code for code, name in enumerate(_TABLE)}
"""The integer code of every loss, as the kernels take it."""
BY_CODE: tuple[Loss, ...] = tuple(_TABLE.values())
# An operator drops the targets of every other loss before anything looks at them.
READ_BY_LABEL_TANGENT = frozenset(name for name, loss in _TABLE.items() if loss.label_tangent_reads_targets)
READ_BY_CURVATURE = frozenset(name for name, loss in _TABLE.items() if loss.curvature_reads_targets)


def of(loss: str) -> Loss:
    """A loss by its name.

    >>> of("mse").curvature_slope
    2.0
    """
    return _TABLE[loss]


def prediction(logits: Tensor, loss: str) -> Tensor:
    """What the loss compares with its target: ``softmax(f)``, ``sigmoid(f)`` or ``f`` itself. ``[N, C]``."""
    return of(loss).prediction(logits)


def loss_per_example(logits: Tensor, targets: Tensor, loss: str) -> Tensor:
    """The definition, ``l(f_i, y_i)`` summed over the C outputs of a row. ``[N]``."""
    return of(loss).per_example(logits, targets)


def residual(logits: Tensor, targets: Tensor, loss: str) -> Tensor:
    """``r = dl/df``. ``[N, C]``."""
    return of(loss).residual(logits, targets)


def residual_tangent(logits: Tensor, targets: Tensor, logit_tangent: Tensor, loss: str) -> Tensor:
    """``(d2l/df2) z``, exact for every loss and any targets: what :func:`curvature` approximates. ``[N, C]``."""
    return of(loss).residual_tangent(logits, targets, logit_tangent)


def label_pull(logits: Tensor, loss: str, targets: Tensor | None = None) -> Tensor:
    """``-dl/dy`` as a function of the logits, up to a constant: its derivative is :func:`label_tangent`. ``[N, C]``."""
    return of(loss).label_pull(logits, label_tangent_targets(targets, loss))


def label_tangent(logits: Tensor, logit_tangent: Tensor, loss: str, targets: Tensor | None = None) -> Tensor:
    """``t(z) = D_z(-dl/dy)``: the derivative of ``-dl/dy`` along the direction. ``[N, C]``."""
    return of(loss).label_tangent(logits, label_tangent_targets(targets, loss), logit_tangent)


def curvature(logits: Tensor, logit_tangent: Tensor, loss: str, targets: Tensor | None = None) -> Tensor:
    """``c(z) = (d2l/df2) z``, for targets that sum to one; Gauss-Newton where the loss is not ``exact``. ``[N, C]``.

    Positive semi-definite for every loss.
    """
    return of(loss).curvature(logits, curvature_targets(targets, loss), logit_tangent)


def gauss_newton(logits: Tensor, targets: Tensor, logit_tangent: Tensor, loss: str) -> Tensor:
    """``c(z)`` of any targets: :func:`residual_tangent` without the curvature of the prediction. ``[N, C]``."""
    c, scale = curvature(logits, logit_tangent, loss, targets), of(loss).curvature_scale(targets)
    return c if scale is None else scale.unsqueeze(-1) * c


def label_tangent_targets(targets: Tensor | None, loss: str) -> Tensor | None:
    """The targets if the label tangent reads them, else None; raises ValueError if they are missing."""
    return _needed(targets, loss) if of(loss).label_tangent_reads_targets else None


def curvature_targets(targets: Tensor | None, loss: str) -> Tensor | None:
    """The targets if the curvature reads them, else None; raises ValueError if they are missing."""
    return _needed(targets, loss) if of(loss).curvature_reads_targets else None


def softmax_jacobian(probabilities: Tensor, vector: Tensor) -> Tensor:
    """``J u = p (u - <p, u>)`` for each row. ``[N, C]``."""
    return probabilities * (vector - (probabilities * vector).sum(-1, keepdim=True))


def as_probabilities(targets: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """Targets as ``[N, C]``: class indices ``[N]`` become one-hot rows, probabilities pass through."""
    if targets.dim() == 1:
        return functional.one_hot(targets, num_classes).to(dtype)
    return targets


def _needed(targets: Tensor | None, loss: str) -> Tensor:
    if targets is None:
        raise ValueError(f"targets are needed by {loss}, got None")
    return targets


def _times(weights: Tensor | None, factor: Tensor) -> Tensor:
    return factor if weights is None else weights.unsqueeze(1) * factor


def _centered(p: Tensor, image: Tensor) -> Tensor:
    """``a - p sum(a)``, in place; for ``a = p z`` this is the softmax Jacobian ``J z``. ``[N, C]``."""
    return image.addcmul_(p, image.sum(1, keepdim=True), value=-1)
