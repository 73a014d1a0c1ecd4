"""Weighted gradient of the last layer."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

import fastmeta
from bench.case import TOLERANCE, Case, Problem, Variant, bytes_of, closed_forms, distance_to
from bench.inputs import SHAPES, LastLayer, Shape, last_layer
from bench.roofline import Cost

OPERATOR = "last_layer_gradient"


def eager(h: Tensor, f: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    r = (f.softmax(-1) - y) * w.unsqueeze(-1)
    return r.T @ h, r.sum(0)


def autograd_to_logits(h: Tensor, f: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    loss = w @ functional.cross_entropy(f, y, reduction="none")
    r = torch.autograd.grad(loss, f)[0]
    return r.T @ h, r.sum(0)


def autograd(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    loss = w @ functional.cross_entropy(functional.linear(h, weight, bias), y, reduction="none")
    return torch.autograd.grad(loss, (weight, bias))


def _peers(x: LastLayer) -> list[Variant]:
    weight, bias, logits = (t.clone().requires_grad_() for t in (x.head_weight, x.head_bias, x.logits))
    to_logits = partial(autograd_to_logits, x.features, logits, x.targets, x.weights)
    from_features = partial(autograd, x.features, weight, bias, x.targets, x.weights)
    return [
        Variant("autograd to the logits", to_logits, grad=True),
        Variant("autograd", from_features, grad=True, note="with the head's forward"),
    ]


def build(shape: Shape, dtype: torch.dtype) -> Problem:
    x = last_layer(shape, dtype)
    arguments = (x.features, x.logits, x.targets, x.weights)
    full = dtype == torch.float32
    variants = closed_forms(fastmeta.ops.last_layer_gradient, [("eager", eager)], arguments, compile=full)
    exact = x.double()
    return Problem(
        variants + (_peers(x) if full else []),
        distance_to(eager(exact.features, exact.logits, exact.targets, exact.weights)),
        Cost(2 * shape.n * shape.d * shape.c, bytes_of(*arguments, x.head_weight, x.head_bias)),
        TOLERANCE[dtype],
    )


CASES = [Case(OPERATOR, str(shape), partial(build, shape)) for shape in SHAPES]
