"""Label gradients from feature similarity."""

from functools import partial

import torch
from torch import Tensor

import fastmeta
from bench.case import TOLERANCE, Case, Problem, bytes_of, closed_forms, distance_to
from bench.inputs import SHAPES, Shape
from bench.roofline import Cost

OPERATOR = "feature_similarity"


def product_order(h_u: Tensor, h_h: Tensor, r: Tensor) -> Tensor:
    return torch.addmm(r.sum(0), h_u, h_h.T @ r)


def gram_order(h_u: Tensor, h_h: Tensor, r: Tensor) -> Tensor:
    return (h_u @ h_h.T + 1) @ r


def multi_dot(h_u: Tensor, h_h: Tensor, r: Tensor) -> Tensor:
    """The order that torch chooses."""
    return torch.linalg.multi_dot([h_u, h_h.T, r]) + r.sum(0)


def build(shape: Shape, dtype: torch.dtype) -> Problem:
    n, d, c = shape
    generator = torch.Generator().manual_seed(0)
    h_u, h_h = torch.randn(2, n, d, generator=generator).to(dtype)
    r = (torch.randn(n, c, generator=generator).softmax(-1) - torch.eye(n, c)).to(dtype)
    product, gram = 4 * n * d * c, 2 * n * n * (d + c)
    forms = [("eager h (h' r)", product_order), ("eager (h h') r", gram_order)]
    if gram < product:  # torch.compile gets the cheaper one
        forms.reverse()
    forms.append(("eager multi_dot", multi_dot))
    full = dtype == torch.float32
    return Problem(
        closed_forms(fastmeta.ops.feature_similarity, forms, (h_u, h_h, r), compile=full),
        distance_to(product_order(h_u.double(), h_h.double(), r.double())),
        Cost(min(product, gram), bytes_of(h_u, h_h, r, r)),
        TOLERANCE[dtype],
    )


CASES = [Case(OPERATOR, str(shape), partial(build, shape)) for shape in SHAPES]
