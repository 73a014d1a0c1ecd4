"""What users have for the last-layer operators besides closed forms: autograd, torch.func, libraries if installed."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench import closed_forms
from bench.case import Variant, compiled
from bench.closed_forms import SCALE
from bench.inputs import LastLayer

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

try:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
except Exception:  # absent, or present without what it needs itself
    LigerFusedLinearCrossEntropyLoss = None

FORWARD = "with the head's forward"
BACKWARD = "with the head's forward and backward"
_LARGE = 2**24  # logits from which peers that keep many copies of them are left out
# Per-example gradients of more bytes than the first are measured on the second's worth of examples and scaled.
MATERIALIZE = {"cpu": (2**29, 2**27), "cuda": (2**33, 2**31)}


def per_example_dot(x: LastLayer) -> list[Variant]:
    if x.logits.numel() > _LARGE:
        return []
    n, c = x.logits.shape
    v, b = x.direction_weight, x.direction_bias
    one = x.features.element_size() * c * x.features.shape[1]
    most, part = MATERIALIZE[x.features.device.type]
    few = None if n * one <= most else max(1, part // one)
    h, f, y = x.features[:few], x.logits[:few], x.targets[:few]
    weight, bias = (t.clone().requires_grad_() for t in (x.head_weight, x.head_bias))
    whole, sliced = (x.features, x.head_weight, x.head_bias, x.targets, v, b), (h, x.head_weight, x.head_bias, y, v, b)
    ones = torch.ones(n, device=h.device, dtype=h.dtype, requires_grad=True)
    double = partial(_double_backward_dot, ones, x.features, weight, bias, x.targets, v, b)
    variants = [
        Variant("func.jvp", partial(_jvp_dot, *whole), note=FORWARD),
        Variant("double backward", double, grad=True, graph=False, note=FORWARD),
        Variant("vmap(grad)", partial(_vmap_grad, *sliced), examples=few, note=FORWARD),
        Variant("materialized", partial(_materialized, h, f, y, v, b), examples=few),
    ]
    if backpack is not None:
        call = partial(BackpackDot(x.head_weight, x.head_bias), h, y, v, b)
        variants.append(Variant("BackPACK", call, grad=True, graph=False, examples=few, note=FORWARD))
    return variants


def _losses(weight: Tensor, bias: Tensor, h: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(functional.linear(h, weight, bias), y, reduction="none")


def _loss(weight: Tensor, bias: Tensor, h: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(functional.linear(h, weight, bias), y, reduction="sum")


def _jvp_dot(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor, v: Tensor, b: Tensor) -> Tensor:
    return torch.func.jvp(lambda w, a: _losses(w, a, h, y), (weight, bias), (v, b))[1]


def _double_backward_dot(
    ones: Tensor, h: Tensor, weight: Tensor, bias: Tensor, y: Tensor, v: Tensor, b: Tensor
) -> Tensor:
    """Example weights of 1 under the loss, differentiated through its gradient (as in learning to reweight)."""
    grads = torch.autograd.grad(ones @ _losses(weight, bias, h, y), (weight, bias), create_graph=True)
    return torch.autograd.grad(grads, ones, grad_outputs=(v, b))[0]


def _vmap_grad(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor, v: Tensor, b: Tensor) -> Tensor:
    gradient = torch.func.grad(_losses, argnums=(0, 1))
    grad_weight, grad_bias = torch.func.vmap(gradient, in_dims=(None, None, 0, 0))(weight, bias, h, y)
    return torch.einsum("ncd,cd->n", grad_weight, v) + grad_bias @ b


def _materialized(h: Tensor, f: Tensor, y: Tensor, v: Tensor, b: Tensor) -> Tensor:
    """The rule by which Opacus fills ``grad_sample``, logits given."""
    r = f.softmax(-1) - y
    return torch.einsum("ncd,cd->n", torch.einsum("nc,nd->ncd", r, h), v) + r @ b


def label_gradient(x: LastLayer) -> list[Variant]:
    if x.logits.numel() > _LARGE:
        return []
    v, b = x.direction_weight, x.direction_bias
    weight, bias, targets = (t.clone().requires_grad_() for t in (x.head_weight, x.head_bias, x.targets))
    double = partial(_double_backward_labels, x.features, weight, bias, targets, v, b)
    return [
        Variant("func.jvp", partial(_jvp_labels, x.features, x.head_weight, x.head_bias, v, b), note=FORWARD),
        Variant("double backward", double, grad=True, graph=False, note=FORWARD),
    ]


def _jvp_labels(h: Tensor, weight: Tensor, bias: Tensor, v: Tensor, b: Tensor) -> Tensor:
    def log_probabilities(w: Tensor, a: Tensor) -> Tensor:
        return functional.linear(h, w, a).log_softmax(-1)

    return SCALE * torch.func.jvp(log_probabilities, (weight, bias), (v, b))[1]


def _double_backward_labels(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor, v: Tensor, b: Tensor) -> Tensor:
    """The definition: how the step of the inner loss changes with its targets."""
    grads = torch.autograd.grad(_loss(weight, bias, h, y), (weight, bias), create_graph=True)
    return torch.autograd.grad(grads, y, grad_outputs=(-SCALE * v, -SCALE * b))[0]


def last_layer_gradient(x: LastLayer) -> list[Variant]:
    if x.logits.numel() > _LARGE:
        return []
    weight, bias, logits = (t.clone().requires_grad_() for t in (x.head_weight, x.head_bias, x.logits))
    to_logits = partial(_autograd_to_logits, x.features, logits, x.targets, x.weights)
    from_features = partial(_autograd, x.features, weight, bias, x.targets, x.weights)
    return [
        Variant("autograd to the logits", to_logits, grad=True),
        Variant("autograd", from_features, grad=True, note=FORWARD),
    ]


def _autograd_to_logits(h: Tensor, f: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    (r,) = torch.autograd.grad(w @ functional.cross_entropy(f, y, reduction="none"), f)
    return r.T @ h, r.sum(0)


def _autograd(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(w @ _losses(weight, bias, h, y), (weight, bias))


def hessian_vector_product(x: LastLayer) -> list[Variant]:
    if x.logits.numel() > _LARGE:
        return []
    h, y, v, b = x.features, x.targets, x.direction_weight, x.direction_bias
    product_cached, on_cpu = closed_forms.hessian_vector_product_cached, h.device.type == "cpu"
    weight, bias = (t.clone().requires_grad_() for t in (x.head_weight, x.head_bias))
    with torch.enable_grad():
        grads = _gradient(weight, bias, h, y)
    double = partial(_double_backward_product, h, weight, bias, y, v, b)
    kept = partial(torch.autograd.grad, grads, (weight, bias), grad_outputs=(v, b), retain_graph=True)
    forward = partial(_jvp_product, h, x.head_weight, x.head_bias, y, v, b)
    p = x.logits.softmax(-1)
    variants = [
        Variant("eager, p cached", partial(product_cached, h, p, v, b), "eager"),
        *([Variant("torch.compile, p cached", partial(compiled(product_cached), h, p, v, b), "compile")] * on_cpu),
        Variant("double backward", double, grad=True, graph=False, note=BACKWARD),
        Variant("double backward, graph kept", kept, grad=True, graph=False),
        Variant("func.jvp(grad)", forward, note=BACKWARD),
    ]
    if curvlinops is not None:
        hessian = hessian_operator(h, y, x.head_weight, x.head_bias, "sum")
        variants.append(Variant("curvlinops", lambda: hessian @ [v, b], grad=True, graph=False, note=BACKWARD))
    return variants


def _gradient(weight: Tensor, bias: Tensor, h: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(_loss(weight, bias, h, y), (weight, bias), create_graph=True)


def _double_backward_product(
    h: Tensor, weight: Tensor, bias: Tensor, y: Tensor, v: Tensor, b: Tensor
) -> tuple[Tensor, ...]:
    return torch.autograd.grad(_gradient(weight, bias, h, y), (weight, bias), grad_outputs=(v, b))


def _jvp_product(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor, v: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    gradient = torch.func.grad(lambda w, a: _loss(w, a, h, y), argnums=(0, 1))
    return torch.func.jvp(gradient, (weight, bias), (v, b))[1]


def linear_cross_entropy(x: LastLayer) -> list[Variant]:
    """Liger's fused linear cross-entropy: the loss, and its gradient in the head, which it takes in the forward."""
    if LigerFusedLinearCrossEntropyLoss is None or x.features.device.type != "cuda":
        return []
    weight, bias, h = (t.clone().requires_grad_() for t in (x.head_weight, x.head_bias, x.features))
    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    call = partial(_liger, loss, weight, bias, h, x.targets.argmax(-1))
    return [Variant("Liger", call, grad=True, graph=False, note="computes the loss and the features' gradient as well")]


def _liger(loss: Callable[..., Tensor], weight: Tensor, bias: Tensor, h: Tensor, y: Tensor) -> tuple[Any, ...]:
    # It takes only what the inputs ask for, by the path of a training step; the features' part is unused here.
    return torch.autograd.grad(loss(weight, h, y, bias), (weight, bias, h), allow_unused=True)[:2]


def linear_module(weight: Tensor, bias: Tensor) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        module.weight.copy_(weight)
        module.bias.copy_(bias)
    return module


class BackpackDot:
    """BackPACK's per-example gradients ``[N, C, D]``, then their products with the direction."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.module = backpack.extend(linear_module(weight, bias))

    def __call__(self, features: Tensor, targets: Tensor, v: Tensor, b: Tensor) -> Tensor:
        loss = functional.cross_entropy(self.module(features), targets, reduction="sum")
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
