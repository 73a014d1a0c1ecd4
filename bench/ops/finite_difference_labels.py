"""The label step from two perturbed forward passes."""

from functools import partial

import torch
from torch import Tensor

import fastmeta
from bench.case import TOLERANCE, Case, Problem, bytes_of, closed_forms, distance_to
from bench.inputs import SHAPES, Shape
from bench.roofline import Cost

OPERATOR = "finite_difference_labels"
STEP = 0.1
EPSILON = 0.5


def ours(f_plus: Tensor, f_minus: Tensor, y: Tensor, epsilon: Tensor) -> Tensor:
    return fastmeta.ops.finite_difference_labels(f_plus, f_minus, y, epsilon, step=STEP)


def eager(f_plus: Tensor, f_minus: Tensor, y: Tensor, epsilon: Tensor) -> Tensor:
    moved = (y - (f_plus.softmax(-1) - f_minus.softmax(-1)) * (STEP / epsilon)).clamp_min_(0)
    total = moved.sum(-1, keepdim=True)
    return torch.where(total > 0, moved / total, 1 / y.shape[-1])


def build(shape: Shape, dtype: torch.dtype) -> Problem:
    n, _, c = shape
    generator = torch.Generator().manual_seed(0)
    f_plus, f_minus, labels = torch.randn(3, n, c, generator=generator)
    arguments = (f_plus.to(dtype), f_minus.to(dtype), labels.softmax(-1).to(dtype), torch.tensor(EPSILON))
    return Problem(
        closed_forms(ours, [("eager", eager)], arguments, compile=dtype == torch.float32),
        distance_to(eager(*(t.double() for t in arguments))),
        Cost(0, bytes_of(*arguments, f_plus.to(dtype))),
        TOLERANCE[dtype],
    )


# The features take no part: shapes that differ only in D are one case.
CASES = [Case(OPERATOR, f"{shape.n}, {shape.c}", partial(build, shape)) for shape in SHAPES]
