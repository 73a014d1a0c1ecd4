"""The whole model's inner and outer problem by plain autograd: K steps of SGD differentiated through.

Nothing here uses fastmeta: every result is PyTorch's own derivative of a definition, in the dtype of the model (float64
in the tests). How a model is evaluated:

- every forward starts from torch's global random state as it is when a function is called, and leaves it there, so that
  all evaluations have one dropout mask for inputs of one shape. Compare with a result computed from the same state;
- the model's mode counts: BatchNorm in train mode takes the statistics of the batch it is given, so examples interact
  and the gradients include that. Unlabeled, labeled and hold-out examples are forwards of their own;
- buffers are cloned for each forward, parameters stay; a tied parameter appears once, under the name that
  ``named_parameters()`` gives it; parameters with ``requires_grad=False`` do not move;
- attention takes the math kernel, which can be differentiated twice.

    problem = Bilevel(model, x_u, z, x_h, y_h, loss="mse", rate=0.3, steps=2)
    brute_force_label_gradient(problem)            # [N, C]
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from brute_force import per_example
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from whole_model_nets import Inputs

from fastmeta.losses import LOSSES

Parameters = dict[str, Tensor]
INNER_LOSSES = tuple(LOSSES)


def trainable(model: nn.Module) -> Parameters:
    """The parameters that move, by name, detached; a tied one once."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def forward(model: nn.Module, inputs: Inputs, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
    """Logits ``[N, C]`` at ``parameters``; a name left out, or None, is at the model's own value."""
    positional, named = ((), dict(inputs)) if isinstance(inputs, Mapping) else (inputs, {})
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.random.fork_rng(devices=[]), sdpa_kernel(SDPBackend.MATH):
            return functional_call(model, {**(parameters or {}), **buffers}, positional, named, tie_weights=True)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def losses_of(logits: Tensor, targets: Tensor, loss: str) -> Tensor:
    """``l(f_i, y_i)`` for targets ``[N, C]`` or classes ``[N]``. ``[N]``."""
    f, y = logits, targets
    if not y.is_floating_point():
        y = functional.one_hot(y, f.shape[1]).to(f.dtype)
    return per_example(f, y, loss)


def reduced_loss(
    logits: Tensor, targets: Tensor, loss: str, weights: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """``sum_i w_i l_i``, divided by N (not by the sum of the weights) for a mean. Scalar."""
    values = losses_of(logits, targets, loss)
    values = values if weights is None else weights * values
    return values.mean() if reduction == "mean" else values.sum()


def _leaves(parameters: Mapping[str, Tensor]) -> Parameters:
    return {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}


def _gradient(value: Tensor, parameters: Parameters, *, create_graph: bool = False) -> Parameters:
    grads = torch.autograd.grad(
        value, list(parameters.values()), create_graph=create_graph, retain_graph=True, materialize_grads=True
    )
    return dict(zip(parameters, grads, strict=True))


def loss_gradient(
    model: nn.Module,
    inputs: Inputs,
    targets: Tensor,
    loss: str = "cross_entropy",
    *,
    parameters: Mapping[str, Tensor] | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Parameters:
    """Gradient of the reduced loss at ``parameters`` (None: the model's own), by name."""
    theta = _leaves(trainable(model) | dict(parameters or {}))
    return _gradient(reduced_loss(forward(model, inputs, theta), targets, loss, weights, reduction), theta)


@dataclass(frozen=True)
class Bilevel:
    """The inner problem ``C^U(theta, z) + labeled_weight C^T(theta)`` and the outer loss ``C^H(theta_K)``.

    K steps of SGD as of ``torch.optim.SGD``: ``m_k = momentum m_{k-1} + grad_k``, ``theta_{k+1} = theta_k - rate m_k``.

    Args:
        model: in the mode and random state that are meant.
        unlabeled: inputs of the N unlabeled examples.
        labels: z, ``[N, C]``.
        holdout: inputs of the hold-out examples.
        targets: of the hold-out examples, ``[Nh]`` classes or ``[Nh, C]``.
        weights: w, ``[N]``; None means 1.
        mask: m, ``[N]``, multiplies the weights; None means 1.
        labeled: inputs of C^T; None: the hold-out examples are the labeled ones.
        labeled_targets: of ``labeled``.
        loss: of C^U, one of INNER_LOSSES.
        labeled_loss: of C^T.
        outer_loss: of C^H, a mean.
        reduction: of C^U and C^T over their examples, ``mean`` or ``sum``.
        labeled_weight: 0 leaves C^T out.
        rate: eta.
        steps: K.
        momentum: of the inner SGD.
    """

    model: nn.Module
    unlabeled: Inputs
    labels: Tensor
    holdout: Inputs
    targets: Tensor
    weights: Tensor | None = None
    mask: Tensor | None = None
    labeled: Inputs | None = None
    labeled_targets: Tensor | None = None
    loss: str = "mse_probs"
    labeled_loss: str = "cross_entropy"
    outer_loss: str = "cross_entropy"
    reduction: str = "mean"
    labeled_weight: float = 0.0
    rate: float = 0.1
    steps: int = 1
    momentum: float = 0.0

    def inner_loss(self, parameters: Parameters, labels: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """``C^U + labeled_weight C^T``; labels and weights replace the problem's own. Scalar."""
        labels = self.labels if labels is None else labels
        weights = self.weights if weights is None else weights
        if self.mask is not None:
            weights = self.mask if weights is None else weights * self.mask
        logits = forward(self.model, self.unlabeled, parameters)
        value = reduced_loss(logits, labels, self.loss, weights, self.reduction)
        if self.labeled_weight == 0:
            return value
        inputs, targets = (self.holdout, self.targets) if self.labeled is None else (self.labeled, self.labeled_targets)
        labeled = reduced_loss(
            forward(self.model, inputs, parameters), targets, self.labeled_loss, reduction=self.reduction
        )
        return value + self.labeled_weight * labeled

    def outer(self, parameters: Parameters) -> Tensor:
        """``C^H``. Scalar."""
        return reduced_loss(forward(self.model, self.holdout, parameters), self.targets, self.outer_loss)

    def trajectory(
        self, labels: Tensor | None = None, weights: Tensor | None = None, shifts: list[Parameters] | None = None
    ) -> list[Parameters]:
        """``theta_0 ... theta_K``, differentiable in labels, weights and ``shifts`` (added to the K gradients)."""
        points, velocity = [_leaves(trainable(self.model))], None
        for k in range(self.steps):
            theta = points[-1]
            step = _gradient(self.inner_loss(theta, labels, weights), theta, create_graph=True)
            if shifts is not None:
                step = {name: g + shifts[k][name] for name, g in step.items()}
            velocity = step if velocity is None else {n: self.momentum * velocity[n] + g for n, g in step.items()}
            points.append({name: p - self.rate * velocity[name] for name, p in theta.items()})
        return points


def brute_force_label_gradient(problem: Bilevel) -> Tensor:
    """``dC^H(theta_K)/dz``. ``[N, C]``."""
    labels = problem.labels.detach().clone().requires_grad_()
    return torch.autograd.grad(problem.outer(problem.trajectory(labels)[-1]), labels)[0]


def brute_force_weight_gradient(problem: Bilevel) -> Tensor:
    """``dC^H(theta_K)/dw``; the mask multiplies it. ``[N]``."""
    weights = torch.ones_like(problem.labels[:, 0]) if problem.weights is None else problem.weights
    weights = weights.detach().clone().requires_grad_()
    return torch.autograd.grad(problem.outer(problem.trajectory(weights=weights)[-1]), weights)[0]


def brute_force_directions(problem: Bilevel) -> list[Parameters]:
    """For each of the K steps the direction v in ``dC^H = sum_k -rate <v_k, d grad_k>``: ``-(dC^H/d grad_k) / rate``.

    The last one is the hold-out gradient at theta_K; with no momentum, the others are ``v_{k-1} = v_k - rate H_k v_k``
    with H_k the Hessian of the inner loss at theta_k. The label gradient is the sum over k of ``rate`` times the label
    tangent at theta_k along v_k.
    """
    theta = trainable(problem.model)
    shifts = [_leaves({name: torch.zeros_like(p) for name, p in theta.items()}) for _ in range(problem.steps)]
    outer = problem.outer(problem.trajectory(shifts=shifts)[-1])
    return [{name: -g / problem.rate for name, g in _gradient(outer, shift).items()} for shift in shifts]


def richardson(function: Callable[[float], Tensor], step: float = 0.005) -> Tensor:
    """``d/dt function(t)`` at 0: central differences at three steps, extrapolated to an error of ``step^6``."""
    column = [(function(h) - function(-h)) / (2 * h) for h in (step, step / 2, step / 4)]
    for order in (4, 16):
        column = [(order * fine - coarse) / (order - 1) for coarse, fine in pairwise(column)]
    return column[0]


def brute_force_directional(
    model: nn.Module, inputs: Inputs, direction: Mapping[str, Tensor], function: Callable[[Tensor], Tensor]
) -> Tensor:
    """``d/dt function(f(theta + t v))`` at ``t = 0``, by two reverse passes; shaped as ``function``'s result.

    ``J^T u`` is linear in a cotangent u, and its derivative along v with respect to u is ``J v``. A name left out of
    the direction does not move. For example ``-losses_of(f, y, loss)``, or the label tangent of cross-entropy with
    ``lambda f: f.log_softmax(-1)``.
    """
    theta = _leaves({name: p for name, p in trainable(model).items() if name in direction})
    value = function(forward(model, inputs, theta))
    cotangent = torch.zeros_like(value, requires_grad=True)
    pulled = torch.autograd.grad(value, list(theta.values()), cotangent, create_graph=True, materialize_grads=True)
    along = sum(((g * direction[name]).sum() for name, g in zip(theta, pulled, strict=True)), cotangent.sum() * 0)
    return torch.autograd.grad(along, cotangent)[0]


def numerical_directional(
    model: nn.Module, inputs: Inputs, direction: Mapping[str, Tensor], function: Callable[[Tensor], Tensor]
) -> Tensor:
    """The same by extrapolated central differences, which :func:`brute_force_directional` is checked with."""
    theta = {name: p for name, p in trainable(model).items() if name in direction}
    length = float(flatten(direction).norm())

    def at(t: float) -> Tensor:
        moved = {name: p + t / length * direction[name] for name, p in theta.items()}
        with torch.no_grad():
            return function(forward(model, inputs, moved))

    return length * richardson(at)


def flatten(parameters: Mapping[str, Tensor], names: tuple[str, ...] | None = None) -> Tensor:
    """One vector ``[P]`` of the named tensors, in the order of ``names`` (None: their own)."""
    return torch.cat([parameters[name].reshape(-1) for name in names or parameters])


def dense_hessian(problem: Bilevel, names: tuple[str, ...] | None = None) -> Tensor:
    """Hessian of the inner loss at theta over the named parameters (None: all), ordered as ``flatten``. ``[P, P]``."""
    theta = _leaves(trainable(problem.model))
    moving = theta if names is None else {name: theta[name] for name in names}
    gradient = flatten(_gradient(problem.inner_loss(theta), moving, create_graph=True))
    return torch.stack([flatten(_gradient(entry, moving)) for entry in gradient])


def brute_force_influence(problem: Bilevel, damping: float, names: tuple[str, ...] | None = None) -> Tensor:
    """``-m_u g_val^T (H + damping I)^{-1} grad l_u`` by a dense solve, over the named parameters (None: all). ``[N]``.

    Not All Unlabeled Data Are Equal, Eq. (6): g_val is the gradient of C^H at theta, H the Hessian of the inner loss,
    l_u the unweighted loss of an unlabeled example.
    """
    theta = _leaves(trainable(problem.model))
    moving = theta if names is None else {name: theta[name] for name in names}
    hessian = dense_hessian(problem, names)
    damped = hessian + damping * torch.eye(len(hessian), dtype=hessian.dtype)
    solution = torch.linalg.solve(damped, flatten(_gradient(problem.outer(theta), moving)))
    values = losses_of(forward(problem.model, problem.unlabeled, theta), problem.labels, problem.loss)
    influence = -torch.stack([flatten(_gradient(value, moving)) @ solution for value in values])
    return influence if problem.mask is None else influence * problem.mask


def brute_force_alignment_gradient(
    model: nn.Module,
    inputs: Inputs,
    label_logits: Tensor,
    ema_labeled: Mapping[str, Tensor],
    ema_fourth: Mapping[str, Tensor],
    *,
    epsilon: float = 1e-3,
    loss: str = "cross_entropy",
    weights: Tensor | None = None,
    reduction: str = "mean",
    labels_of: Callable[[Tensor], Tensor] = lambda w: w.softmax(-1),
) -> Tensor:
    """``d/dw sum_k (EMA(g_l) - g_u)_k^2 / (epsilon + sqrt(EMA(v_k^4)))``. ``[N, C]``.

    Label Gradient Alignment, Algorithm 1 and Eq. (2), with ``g_u = grad_theta L(theta, x_u, labels_of(w))``. The
    averages, by parameter name, are those after their update with this batch, and constant; the sum runs over the names
    in ``ema_labeled``. ``labels_of=lambda y: y`` gives the gradient with respect to the labels themselves.
    """
    theta = _leaves(trainable(model))
    logits = label_logits.detach().clone().requires_grad_()
    value = reduced_loss(forward(model, inputs, theta), labels_of(logits), loss, weights, reduction)
    g_u = _gradient(value, {name: theta[name] for name in ema_labeled}, create_graph=True)
    objective = sum(
        ((ema_labeled[name] - g).square() / (epsilon + ema_fourth[name].sqrt())).sum() for name, g in g_u.items()
    )
    return torch.autograd.grad(objective, logits)[0]
