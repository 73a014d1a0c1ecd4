"""The label step from two perturbed forward passes."""

from functools import partial

import torch
from torch import Tensor

import fastmeta
from bench import kernels
from bench.case import (
    TOLERANCE,
    Case,
    Problem,
    bytes_of,
    checked_rows,
    compile_modes,
    distance_to,
    number_of_sets,
    variants,
)
from bench.floors import Cost
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


def build(n: int, c: int, dtype: torch.dtype, device: str) -> Problem:
    first = arguments(n, c, dtype, device, 0)
    moved = bytes_of(*first, first[0])
    sets = [first] + [arguments(n, c, dtype, device, seed) for seed in range(1, number_of_sets(moved, device))]
    rows = checked_rows(n, c, device)
    plus, minus, labels, epsilon = first
    truth = eager(plus[rows].double(), minus[rows].double(), labels[rows].double(), epsilon)
    forms, modes = kernels.offered(OPERATOR, c, device), compile_modes(dtype, device)
    return Problem(
        variants(ours, forms, [("eager", eager)], sets, modes),
        distance_to(truth, rows),
        Cost(0, moved, len(sets) * moved),
        TOLERANCE[dtype],
        n,
    )


def cases(device: str) -> list[Case]:
    """The features take no part: shapes that differ only in D are one case."""
    rows = dict.fromkeys([(shape.n, shape.c) for shape in SHAPES[device]] + [*BANDWIDTH_ROWS[device]])
    return [Case(OPERATOR, f"{n}, {c}", partial(build, n, c)) for n, c in rows]
