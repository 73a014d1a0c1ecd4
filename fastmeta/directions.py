"""Directions: along what does the last layer move?

A rule maps a :class:`fastmeta.problem.Problem` to a direction ``(V, b)``. Rules that refine another one take it as
``of``, so that they nest: ``UnitLength(LookAhead(HoldoutGradient(), rate=0.1))``.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastmeta import losses, ops
from fastmeta.problem import Direction, Factors, Problem, Reduction, Rows, example_weights

DirectionRule = Callable[[Problem], Direction | Factors]
Solver = Literal["auto", "cholesky", "cg", "pcg"]


def _gradient(
    rows: Rows, targets: Tensor, loss: str, bias: bool, weights: Tensor | None, reduction: Reduction
) -> Direction:
    weights = example_weights(len(rows.features), weights, reduction, rows.logits)
    weight, grad_bias = ops.last_layer_gradient(rows.features, rows.logits, targets, weights, loss=loss)
    return Direction(weight, grad_bias if bias else None)


@dataclass(frozen=True)
class HoldoutGradient:
    """Gradient of the mean hold-out loss, ``v = grad C^H`` (Learning to Impute, Eq. (V1); Meta-Gradient, Eq. (14)).

    Args:
        loss: the outer loss.
        bias: False leaves the bias out of the direction.
        factored: return :class:`fastmeta.problem.Factors`, which :class:`fastmeta.derivatives.FeatureSimilarity` needs.
        reduction: mean, or sum over the hold-out examples.
    """

    loss: str = "cross_entropy"
    bias: bool = True
    factored: bool = False
    reduction: Reduction = "mean"

    def __call__(self, problem: Problem) -> Direction | Factors:
        """The direction at the parameters that gave ``problem.holdout``."""
        bias = self.bias and problem.has_bias
        rows = problem.holdout
        if not self.factored:
            return _gradient(rows, problem.targets, self.loss, bias, None, self.reduction)
        targets = losses.as_probabilities(problem.targets, rows.logits.shape[1], rows.logits.dtype)
        residual = losses.residual(rows.logits, targets, self.loss)
        scale = 1 / max(len(residual), 1) if self.reduction == "mean" else 1.0
        return Factors(rows.features, residual * scale, bias)


@dataclass(frozen=True)
class LookAhead:
    """Another direction, taken after one inner step: at ``theta* = theta - rate grad (C^U + labeled_weight C^T)``.

    Learning to Impute, Eq. (3) with one step of SGD. Only the last layer moves, so the features stay and the logits
    become ``f - rate (h G^T + g_b)``. (C^T does not enter ``d theta* / dz`` but moves theta*.)

    Args:
        of: the rule evaluated at theta*.
        rate: eta.
        loss: the inner loss.
        reduction: of C^U and C^T over their examples.
        labeled_weight: 0 leaves C^T, a cross-entropy, out.
    """

    of: DirectionRule = HoldoutGradient()
    rate: float = 1.0
    loss: str = "mse_probs"
    reduction: Reduction = "mean"
    labeled_weight: float = 0.0

    def __call__(self, problem: Problem) -> Direction | Factors:
        """The direction of ``of`` at theta*."""
        step = self.inner_gradient(problem)

        def moved(rows: Rows) -> Rows:
            tangent = rows.features @ step.weight.T
            if step.bias is not None:
                tangent = tangent + step.bias
            return Rows(rows.features, rows.logits - self.rate * tangent)

        ahead = dataclasses.replace(
            problem,
            unlabeled=moved(problem.unlabeled),
            holdout=moved(problem.holdout),
            labeled=None if problem.labeled is None else moved(problem.labeled),
        )
        return self.of(ahead)

    def inner_gradient(self, problem: Problem) -> Direction:
        """``grad (C^U + labeled_weight C^T)`` at theta."""
        bias = problem.has_bias
        step = _gradient(problem.unlabeled, problem.labels, self.loss, bias, problem.inner_weights, self.reduction)
        if self.labeled_weight == 0:
            return step
        rows, targets = problem.labeled_rows()
        labeled = _gradient(rows, targets, "cross_entropy", bias, None, self.reduction)
        weight = step.weight + self.labeled_weight * labeled.weight
        if step.bias is None or labeled.bias is None:
            return Direction(weight, None)
        return Direction(weight, step.bias + self.labeled_weight * labeled.bias)


@dataclass(frozen=True)
class UnitLength:
    """Another direction at length 1, ``v / ||v||`` over weight and bias together; zero stays zero.

    Args:
        of: the rule to scale.
    """

    of: DirectionRule = HoldoutGradient()

    def __call__(self, problem: Problem) -> Direction | Factors:
        """The scaled direction; its length never leaves the device."""
        direction = self.of(problem)
        scale = 1 / norm(direction)
        if isinstance(direction, Factors):
            return direction._replace(residual=direction.residual * scale)
        return Direction(direction.weight * scale, None if direction.bias is None else direction.bias * scale)


def norm(direction: Direction | Factors) -> Tensor:
    """Euclidean length over weight and bias together, at least the dtype's smallest normal number. Scalar."""
    dense = direction.dense()
    square = dense.weight.square().sum()
    if dense.bias is not None:
        square = square + dense.bias.square().sum()
    return square.sqrt().clamp_min(torch.finfo(square.dtype).tiny)


@dataclass(frozen=True)
class InverseHessian:
    """``(H + damping I)^{-1} v`` of another direction, with H the Hessian of the inner problem at the last layer.

    Not All Unlabeled Data Are Equal, Eq. (6): H of ``C^T + C^U`` with cross-entropies. Leaving this rule out (H = I)
    is the identity approximation of Luketina et al. (2016).

    Args:
        of: the rule that gives v.
        damping: > 0; weight decay enters here.
        solver: ``auto``, ``cholesky`` (exact), ``cg`` or ``pcg``; see :func:`fastmeta.ops.solve_hessian`.
        tol: relative residual at which the iterative solvers stop.
        max_iter: and their limit.
        loss: the inner loss on the unlabeled examples, which is the labeled one too.
    """

    of: DirectionRule = HoldoutGradient()
    damping: float = 0.1
    solver: Solver = "auto"
    tol: float = 1e-4
    max_iter: int = 100
    loss: str = "cross_entropy"

    def __call__(self, problem: Problem) -> Direction:
        """Solve at the problem's own logits."""
        rhs = self.of(problem).dense()
        labeled, _ = problem.labeled_rows()
        parts = [(labeled, None), (problem.unlabeled, problem.inner_weights)]
        features = torch.cat([rows.features for rows, _ in parts])
        logits = torch.cat([rows.logits for rows, _ in parts])
        weights = torch.cat([_mean_weights(rows, weights) for rows, weights in parts])
        solution = ops.solve_hessian(
            features,
            logits,
            rhs.weight,
            rhs.bias,
            weights,
            loss=self.loss,
            damping=self.damping,
            solver=self.solver,
            tol=self.tol,
            max_iter=self.max_iter,
        )
        return Direction(solution.weight, solution.bias)


def _mean_weights(rows: Rows, weights: Tensor | None) -> Tensor:
    reduced = example_weights(len(rows.features), weights, "mean", rows.logits)
    assert reduced is not None, "a mean always has weights"
    return reduced


class NormalizedGap:
    """The gap between labeled and unlabeled gradient, each coordinate divided by its own scale.

    ``2 v / (epsilon + sqrt(EMA(v^4)))`` with ``v = EMA(g_l) - g_u``: minus the gradient of the objective of Label
    Gradient Alignment (Algorithm 1, Eq. (2)) with respect to ``g_u``, averages held constant. The averages include
    the current batch and start from the first one.

    Args:
        decay: of the average of ``g_l``.
        decay_norm: of the average of ``v^4``.
        epsilon: added to the scale.
        loss: of both gradients, means over their examples.
    """

    def __init__(
        self, *, decay: float = 0.99, decay_norm: float = 0.99, epsilon: float = 1e-3, loss: str = "cross_entropy"
    ) -> None:
        self.decay = decay
        self.decay_norm = decay_norm
        self.epsilon = epsilon
        self.loss = loss
        self.ema_labeled: list[Tensor] = []
        self.ema_fourth: list[Tensor] = []

    def __call__(self, problem: Problem) -> Direction:
        """Update the averages with this batch and return the direction."""
        rows, targets = problem.labeled_rows()
        labeled = _gradient(rows, targets, self.loss, problem.has_bias, None, "mean")
        unlabeled = _gradient(
            problem.unlabeled, problem.labels, self.loss, problem.has_bias, problem.inner_weights, "mean"
        )
        g_l = [g for g in labeled if g is not None]
        g_u = [g for g in unlabeled if g is not None]
        if not self.ema_labeled:
            self.ema_labeled = [g.clone() for g in g_l]
            self.ema_fourth = [(first - second) ** 4 for first, second in zip(g_l, g_u, strict=True)]
        shapes = [[list(tensor.shape) for tensor in tensors] for tensors in (self.ema_labeled, g_l)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"the averages of {shapes[0]} do not fit gradients of {shapes[1]}; use one rule a layer")
        self.ema_labeled = [ema.to(g) for ema, g in zip(self.ema_labeled, g_l, strict=True)]
        self.ema_fourth = [ema.to(g) for ema, g in zip(self.ema_fourth, g_l, strict=True)]
        direction = ops.alignment_direction(
            g_l,
            g_u,
            self.ema_labeled,
            self.ema_fourth,
            decay=self.decay,
            decay_norm=self.decay_norm,
            epsilon=self.epsilon,
        )
        return Direction(direction[0], direction[1] if problem.has_bias else None)

    def state_dict(self) -> dict[str, Any]:
        """The averages."""
        return {
            "ema_labeled": [ema.clone() for ema in self.ema_labeled],
            "ema_fourth": [ema.clone() for ema in self.ema_fourth],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the averages of :meth:`state_dict`."""
        self.ema_labeled = [ema.clone() for ema in state["ema_labeled"]]
        self.ema_fourth = [ema.clone() for ema in state["ema_fourth"]]
