"""Per-example gradients times a direction."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

import fastmeta
from bench import optional_peers
from bench.case import TOLERANCE, Case, Problem, Variant, bytes_of, closed_forms, distance_to
from bench.inputs import SHAPES, LastLayer, Shape, last_layer
from bench.roofline import Cost

OPERATOR = "per_example_dot"

# Per-example gradients of more bytes than this are measured on a slice of the examples, and the time is scaled.
MATERIALIZE_AT_MOST = 2**29
SLICE = 2**27


def eager(h: Tensor, f: Tensor, y: Tensor, v: Tensor, b: Tensor) -> Tensor:
    return ((f.softmax(-1) - y) * functional.linear(h, v, b)).sum(-1)


def eager_reordered(h: Tensor, f: Tensor, y: Tensor, v: Tensor, b: Tensor) -> Tensor:
    r = f.softmax(-1) - y
    return ((r @ v) * h).sum(-1) + r @ b


def _loss(weight: Tensor, bias: Tensor, h: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(functional.linear(h, weight, bias), y, reduction="none")


def func_jvp(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor, v: Tensor, b: Tensor) -> Tensor:
    return torch.func.jvp(lambda w, a: _loss(w, a, h, y), (weight, bias), (v, b))[1]


def double_backward(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor, v: Tensor, b: Tensor) -> Tensor:
    """Example weights of 1 under the loss, differentiated through its gradient (as in learning to reweight)."""
    ones = torch.ones(h.shape[0], requires_grad=True)
    grads = torch.autograd.grad(ones @ _loss(weight, bias, h, y), (weight, bias), create_graph=True)
    return torch.autograd.grad(grads, ones, grad_outputs=(v, b))[0]


def vmap_grad(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor, v: Tensor, b: Tensor) -> Tensor:
    gradient = torch.func.grad(_loss, argnums=(0, 1))
    grad_weight, grad_bias = torch.func.vmap(gradient, in_dims=(None, None, 0, 0))(weight, bias, h, y)
    return torch.einsum("ncd,cd->n", grad_weight, v) + grad_bias @ b


def materialized(h: Tensor, f: Tensor, y: Tensor, v: Tensor, b: Tensor) -> Tensor:
    """The rule by which Opacus fills ``grad_sample``, logits given."""
    r = f.softmax(-1) - y
    return torch.einsum("ncd,cd->n", torch.einsum("nc,nd->ncd", r, h), v) + r @ b


def _peers(x: LastLayer) -> list[Variant]:
    v, b = x.direction_weight, x.direction_bias
    n, c = x.logits.shape
    gradient_bytes = 4 * c * x.features.shape[1]
    few = None if n * gradient_bytes <= MATERIALIZE_AT_MOST else max(1, SLICE // gradient_bytes)
    h, f, y = x.features[:few], x.logits[:few], x.targets[:few]
    weight, bias = (t.clone().requires_grad_() for t in (x.head_weight, x.head_bias))
    forward = "with the head's forward"
    variants = [
        Variant("func.jvp", partial(func_jvp, x.features, x.head_weight, x.head_bias, x.targets, v, b), note=forward),
        Variant(
            "double backward",
            partial(double_backward, x.features, weight, bias, x.targets, v, b),
            grad=True,
            note=forward,
        ),
        Variant("vmap(grad)", partial(vmap_grad, h, x.head_weight, x.head_bias, y, v, b), examples=few, note=forward),
        Variant("materialized", partial(materialized, h, f, y, v, b), examples=few),
    ]
    if optional_peers.backpack is not None:
        call = partial(optional_peers.BackpackDot(x.head_weight, x.head_bias), h, y, v, b)
        variants.append(Variant("BackPACK", call, grad=True, examples=few, note=forward))
    return variants


def build(shape: Shape, dtype: torch.dtype) -> Problem:
    x = last_layer(shape, dtype)
    arguments = (x.features, x.logits, x.targets, x.direction_weight, x.direction_bias)
    full = dtype == torch.float32
    forms = [("eager", eager), ("eager (R V) h", eager_reordered)]
    variants = closed_forms(fastmeta.ops.per_example_dot, forms, arguments, compile=full)
    exact = x.double()
    truth = eager(exact.features, exact.logits, exact.targets, exact.direction_weight, exact.direction_bias)
    return Problem(
        variants + (_peers(x) if full else []),
        distance_to(truth, rows=shape.n),
        Cost(2 * shape.n * shape.d * shape.c, bytes_of(*arguments) + shape.n * x.features.element_size()),
        TOLERANCE[dtype],
        shape.n,
    )


CASES = [Case(OPERATOR, str(shape), partial(build, shape)) for shape in SHAPES]
