"""The dot product of each example's gradient with a direction, ``<r_i, h_i V^T + b>``."""

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import fastmeta
from bench.case import Variant
from bench.inputs import LastLayer
from bench.ops.last_layer import FORWARD, Operator, head, leaves, linear_module, losses, tangent

try:
    import backpack
    import backpack.extensions

    # A warning about inputs without gradients, as the features are here.
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
except ImportError:
    backpack = None

# Materialized gradients of more than the first number of bytes: measured on examples of the second, and scaled.
MATERIALIZE = {"cpu": (2**29, 2**27), "cuda": (2**33, 2**31)}


def eager(h: Tensor, f: Tensor, y: Tensor, v: Tensor, b: Tensor) -> Tensor:
    return ((f.softmax(-1) - y) * functional.linear(h, v, b)).sum(-1)


def reordered(h: Tensor, f: Tensor, y: Tensor, v: Tensor, b: Tensor) -> Tensor:
    r = f.softmax(-1) - y
    return ((r @ v) * h).sum(-1) + r @ b


def from_head(h: Tensor, head: Any, y: Tensor, v: Tensor, b: Tensor) -> Tensor:
    z = functional.linear(h, v, b)
    p = functional.linear(h, head.weight, head.bias).softmax(-1)
    return (p * z).sum(-1) - z.gather(1, y.unsqueeze(1)).squeeze(1)


def peers(x: LastLayer) -> list[Variant]:
    n, c = x.logits.shape
    v, b = x.direction_weight, x.direction_bias
    one = x.features.element_size() * c * x.features.shape[1]
    most, part = MATERIALIZE[x.features.device.type]
    few = None if n * one <= most else max(1, part // one)
    h, f, y = x.features[:few], x.logits[:few], x.targets[:few]
    weight, bias = leaves(x.head_weight, x.head_bias)
    ones = torch.ones(n, device=h.device, dtype=h.dtype, requires_grad=True)

    def jvp() -> Tensor:
        parameters = x.head_weight, x.head_bias
        return torch.func.jvp(lambda w, a: losses(w, a, x.features, x.targets), parameters, (v, b))[1]

    def double_backward() -> Tensor:
        """Example weights of 1 under the loss, differentiated through its gradient (as in learning to reweight)."""
        total = ones @ losses(weight, bias, x.features, x.targets)
        grads = torch.autograd.grad(total, (weight, bias), create_graph=True)
        return torch.autograd.grad(grads, ones, grad_outputs=(v, b))[0]

    def vmap_grad() -> Tensor:
        gradient = torch.func.vmap(torch.func.grad(losses, argnums=(0, 1)), in_dims=(None, None, 0, 0))
        grad_weight, grad_bias = gradient(x.head_weight, x.head_bias, h, y)
        return dots(grad_weight, grad_bias, v, b)

    def materialized() -> Tensor:
        """The rule by which Opacus fills ``grad_sample``, logits given."""
        r = f.softmax(-1) - y
        return dots(torch.einsum("nc,nd->ncd", r, h), r, v, b)

    variants = [
        Variant("func.jvp", jvp, note=FORWARD),
        Variant("double backward", double_backward, grad=True, graph=False, note=FORWARD),
        Variant("vmap(grad)", vmap_grad, examples=few, note=FORWARD),
        Variant("materialized", materialized, examples=few),
    ]
    if backpack is not None:
        call = partial(BackpackDot(x.head_weight, x.head_bias), h, y, v, b)
        variants.append(Variant("BackPACK", call, grad=True, graph=False, examples=few, note=FORWARD))
    return variants


def dots(weight: Tensor, bias: Tensor, v: Tensor, b: Tensor) -> Tensor:
    """Of per-example gradients ``[N, C, D]`` and ``[N, C]`` with the direction."""
    return torch.einsum("ncd,cd->n", weight, v) + bias @ b


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
        return dots(grad_weight, grad_bias, v, b)


ON_LOGITS = Operator(
    "per_example_dot",
    fastmeta.ops.per_example_dot,
    (("eager", eager), ("eager (R V) h", reordered)),
    lambda x: (x.features, x.logits, x.targets, x.direction_weight, x.direction_bias),
    lambda shape: (tangent(shape),),
    3,  # z, f, y
    lambda shape: shape.n,
    peers,
)
# With classes as targets, as a language model has them.
FROM_HEAD = Operator(
    "per_example_dot",
    fastmeta.ops.per_example_dot,
    (("eager", from_head),),
    lambda x: (x.features, head(x), x.targets.argmax(-1), x.direction_weight, x.direction_bias),
    lambda shape: 2 * (tangent(shape),),
    2,  # f, z
    lambda shape: shape.n,
    from_head=True,
)
