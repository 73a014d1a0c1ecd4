"""Label gradients of the last layer."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

import fastmeta
from bench.case import TOLERANCE, Case, Problem, Variant, bytes_of, closed_forms, distance_to
from bench.inputs import SHAPES, LastLayer, Shape, last_layer
from bench.roofline import Cost

OPERATOR = "label_gradient"
SCALE = 0.1


def ours(h: Tensor, f: Tensor, v: Tensor, b: Tensor) -> Tensor:
    return fastmeta.ops.label_gradient(h, f, v, b, scale=SCALE)


def eager(h: Tensor, f: Tensor, v: Tensor, b: Tensor) -> Tensor:
    z = functional.linear(h, v, b)
    return (z - (f.softmax(-1) * z).sum(-1, keepdim=True)) * SCALE


def eager_vecdot(h: Tensor, f: Tensor, v: Tensor, b: Tensor) -> Tensor:
    z = torch.addmm(b, h, v.T, beta=SCALE, alpha=SCALE)
    return z - torch.linalg.vecdot(f.softmax(-1), z).unsqueeze(-1)


def func_jvp(h: Tensor, weight: Tensor, bias: Tensor, v: Tensor, b: Tensor) -> Tensor:
    def log_probabilities(w: Tensor, a: Tensor) -> Tensor:
        return functional.linear(h, w, a).log_softmax(-1)

    return SCALE * torch.func.jvp(log_probabilities, (weight, bias), (v, b))[1]


def double_backward(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor, v: Tensor, b: Tensor) -> Tensor:
    """The definition: how the step of the inner loss changes with its targets."""
    loss = functional.cross_entropy(functional.linear(h, weight, bias), y, reduction="sum")
    grads = torch.autograd.grad(loss, (weight, bias), create_graph=True)
    return torch.autograd.grad(grads, y, grad_outputs=(-SCALE * v, -SCALE * b))[0]


def _peers(x: LastLayer) -> list[Variant]:
    v, b, forward = x.direction_weight, x.direction_bias, "with the head's forward"
    weight, bias, targets = (t.clone().requires_grad_() for t in (x.head_weight, x.head_bias, x.targets))
    return [
        Variant("func.jvp", partial(func_jvp, x.features, x.head_weight, x.head_bias, v, b), note=forward),
        Variant(
            "double backward",
            partial(double_backward, x.features, weight, bias, targets, v, b),
            grad=True,
            note=forward,
        ),
    ]


def build(shape: Shape, dtype: torch.dtype) -> Problem:
    x = last_layer(shape, dtype)
    arguments = (x.features, x.logits, x.direction_weight, x.direction_bias)
    full = dtype == torch.float32
    variants = closed_forms(ours, [("eager", eager), ("eager addmm, vecdot", eager_vecdot)], arguments, compile=full)
    exact = x.double()
    truth = eager(exact.features, exact.logits, exact.direction_weight, exact.direction_bias)
    return Problem(
        variants + (_peers(x) if full else []),
        distance_to(truth),
        Cost(2 * shape.n * shape.d * shape.c, bytes_of(*arguments, x.logits)),
        TOLERANCE[dtype],
    )


CASES = [Case(OPERATOR, str(shape), partial(build, shape)) for shape in SHAPES]
