"""Peers that are measured when they are installed."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

try:
    import backpack
    import backpack.extensions

    # Its hooks sit on a module whose input is a constant, as here.
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
except ImportError:
    backpack = None

try:
    import curvlinops
    from curvlinops.examples import IdentityLinearOperator
except ImportError:
    curvlinops = None


def linear_module(weight: Tensor, bias: Tensor) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        module.weight.copy_(weight)
        module.bias.copy_(bias)
    return module


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits, targets, reduction="sum")


class BackpackDot:
    """BackPACK's per-example gradients ``[N, C, D]``, then their products with the direction."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.module = backpack.extend(linear_module(weight, bias))

    def __call__(self, features: Tensor, targets: Tensor, v: Tensor, b: Tensor) -> Tensor:
        loss = cross_entropy_sum(self.module(features), targets)
        with backpack.backpack(backpack.extensions.BatchGrad()):
            loss.backward(inputs=list(self.module.parameters()))
        grad_weight, grad_bias = self.module.weight.grad_batch, self.module.bias.grad_batch
        self.module.weight.grad = self.module.bias.grad = None
        del self.module.weight.grad_batch, self.module.bias.grad_batch
        return torch.einsum("ncd,cd->n", grad_weight, v) + grad_bias @ b


def hessian_operator(features: Tensor, targets: Tensor, weight: Tensor, bias: Tensor, reduction: str) -> Any:
    """The Hessian of the cross-entropy in the last layer, as a linear operator of curvlinops."""
    module = linear_module(weight, bias)
    loss = nn.CrossEntropyLoss(reduction=reduction)
    # The operator would otherwise run every product twice at construction.
    return curvlinops.HessianLinearOperator(
        module, loss, list(module.parameters()), [(features, targets)], check_deterministic=False
    )


def solve_cg(operator: Any, rhs: list[Tensor], damping: float, tol: float, max_iter: int) -> list[Tensor]:
    """Conjugate gradients of curvlinops: GPyTorch's, at least 11 iterations."""
    shifted = operator + damping * IdentityLinearOperator([tuple(t.shape) for t in rhs], rhs[0].device, rhs[0].dtype)
    return curvlinops.CGInverseLinearOperator(shifted, tolerance=tol, max_iter=max_iter, max_tridiag_iter=0) @ rhs
