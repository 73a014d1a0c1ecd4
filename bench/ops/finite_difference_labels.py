"""The label step from two perturbed forward passes."""

from functools import partial

import torch
from torch import Tensor

import fastmeta
from bench import kernels
from bench.case import Case, Error, Workload, checked_rows, distance_to, workload_on_sets
from bench.inputs import SHAPES

OPERATOR = "finite_difference_labels"
STEP = 0.1
EPSILON = 0.5
# Rows enough to fill a GPU's memory system, for the label step as a share of the copy bandwidth.
BANDWIDTH_ROWS = {"cpu": (), "cuda": ((65536, 256), (32768, 1000), (8192, 4000))}


def ours(f_plus: Tensor, f_minus: Tensor, y: Tensor, epsilon: Tensor, impl: str | None = None) -> Tensor:
    return fastmeta.ops.finite_difference_labels(f_plus, f_minus, y, epsilon, step=STEP, impl=impl)


def eager(f_plus: Tensor, f_minus: Tensor, y: Tensor, epsilon: Tensor) -> Tensor:
    moved = (y - (f_plus.softmax(-1) - f_minus.softmax(-1)) * (STEP / epsilon)).clamp_min_(0)
    total = moved.sum(-1, keepdim=True)
    return torch.where(total > 0, moved / total, 1 / y.shape[-1])


def arguments(n: int, c: int, dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(seed)
    plus, minus, labels = (torch.randn(n, c, generator=generator, device=device) for _ in range(3))
    return plus.to(dtype), minus.to(dtype), labels.softmax(-1).to(dtype), torch.tensor(EPSILON, device=device)


def build(n: int, c: int, dtype: torch.dtype, device: str) -> Workload:
    def error(first: tuple[Tensor, ...]) -> Error:
        rows = checked_rows(n, c, device)
        plus, minus, labels = (t[rows].double() for t in first[:3])
        return distance_to(eager(plus, minus, labels, first[3]), rows)

    forms, make = kernels.offered(OPERATOR, c, device), partial(arguments, n, c, dtype, device)
    return workload_on_sets(ours, forms, [("eager", eager)], make, error, n * c * dtype.itemsize, (), dtype, device)


def cases(device: str) -> list[Case]:
    """The features take no part: shapes that differ only in D are one case."""
    rows = dict.fromkeys([(shape.n, shape.c) for shape in SHAPES[device]] + [*BANDWIDTH_ROWS[device]])
    return [Case(OPERATOR, f"{n}, {c}", partial(build, n, c)) for n, c in rows]
