"""The four last-layer operators as a user writes them: eager closed forms on logits, and on a head in their place."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

SCALE = 0.1


def per_example_dot(h: Tensor, f: Tensor, y: Tensor, v: Tensor, b: Tensor) -> Tensor:
    return ((f.softmax(-1) - y) * functional.linear(h, v, b)).sum(-1)


def per_example_dot_reordered(h: Tensor, f: Tensor, y: Tensor, v: Tensor, b: Tensor) -> Tensor:
    r = f.softmax(-1) - y
    return ((r @ v) * h).sum(-1) + r @ b


def label_gradient(h: Tensor, f: Tensor, v: Tensor, b: Tensor) -> Tensor:
    z = functional.linear(h, v, b)
    return (z - (f.softmax(-1) * z).sum(-1, keepdim=True)) * SCALE


def label_gradient_vecdot(h: Tensor, f: Tensor, v: Tensor, b: Tensor) -> Tensor:
    z = torch.addmm(b, h, v.T, beta=SCALE, alpha=SCALE)
    return z - torch.linalg.vecdot(f.softmax(-1), z).unsqueeze(-1)


def last_layer_gradient(h: Tensor, f: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    r = (f.softmax(-1) - y) * w.unsqueeze(-1)
    return r.T @ h, r.sum(0)


def hessian_vector_product(h: Tensor, f: Tensor, v: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return hessian_vector_product_cached(h, f.softmax(-1), v, b)


def hessian_vector_product_cached(h: Tensor, p: Tensor, v: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """As inside a solver, which has the probabilities from its first product."""
    z = functional.linear(h, v, b)
    c = p * (z - (p * z).sum(-1, keepdim=True))
    return c.T @ h, c.sum(0)


def dot_from_head(h: Tensor, head: Any, y: Tensor, v: Tensor, b: Tensor) -> Tensor:
    z = functional.linear(h, v, b)
    p = functional.linear(h, head.weight, head.bias).softmax(-1)
    return (p * z).sum(-1) - z.gather(1, y.unsqueeze(1)).squeeze(1)


def label_gradient_from_head(h: Tensor, head: Any, v: Tensor, b: Tensor) -> Tensor:
    return label_gradient(h, functional.linear(h, head.weight, head.bias), v, b)


def gradient_from_head(h: Tensor, head: Any, y: Tensor) -> tuple[Tensor, Tensor]:
    p = functional.linear(h, head.weight, head.bias).softmax(-1)
    r = p.scatter_add_(1, y.unsqueeze(1), p.new_full((len(y), 1), -1.0))
    return r.T @ h, r.sum(0)
