"""Label gradients from feature similarity."""

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
from bench.floors import Cost, Gemm
from bench.inputs import SHAPES, Shape

OPERATOR = "feature_similarity"


def product_order(h_u: Tensor, h_h: Tensor, r: Tensor) -> Tensor:
    return torch.addmm(r.sum(0), h_u, h_h.T @ r)


def gram_order(h_u: Tensor, h_h: Tensor, r: Tensor) -> Tensor:
    return (h_u @ h_h.T + 1) @ r


def multi_dot(h_u: Tensor, h_h: Tensor, r: Tensor) -> Tensor:
    """The order that torch chooses."""
    return torch.linalg.multi_dot([h_u, h_h.T, r]) + r.sum(0)


def arguments(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor, ...]:
    n, d, c = shape
    generator = torch.Generator(device).manual_seed(seed)
    h_u, h_h = (torch.randn(n, d, generator=generator, device=device).to(dtype) for _ in range(2))
    residual = torch.randn(n, c, generator=generator, device=device).softmax(-1)
    residual[torch.arange(n), torch.arange(n) % c] -= 1
    return h_u, h_h, residual.to(dtype)


def products(shape: Shape) -> tuple[Gemm, ...]:
    """Of the cheaper order."""
    n, d, c = shape
    if 4 * n * d * c <= 2 * n * n * (d + c):
        return Gemm(d, n, c, "tn"), Gemm(n, d, c, "nn")
    return Gemm(n, d, n, "nt"), Gemm(n, n, c, "nn")


def build(shape: Shape, dtype: torch.dtype, device: str) -> Problem:
    first = arguments(shape, dtype, device, 0)
    moved = bytes_of(*first, first[2])
    sets = [first] + [arguments(shape, dtype, device, seed) for seed in range(1, number_of_sets(moved, device))]
    eager = [("eager h (h' r)", product_order), ("eager (h h') r", gram_order), ("eager multi_dot", multi_dot)]
    gemms = products(shape)
    if gemms[0].kind == "nt":  # torch.compile gets the cheaper one
        eager[:2] = reversed(eager[:2])
    rows = checked_rows(shape.n, max(shape.c, shape.d), device)
    truth = product_order(first[0][rows].double(), first[1].double(), first[2].double())
    forms, modes = kernels.offered(OPERATOR, shape.c, device, dtype), compile_modes(dtype, device)
    return Problem(
        variants(fastmeta.ops.feature_similarity, forms, eager, sets, modes),
        distance_to(truth, rows),
        Cost(sum(gemm.flops for gemm in gemms), moved, len(sets) * moved, gemms),
        TOLERANCE[dtype],
        shape.n,
    )


def cases(device: str) -> list[Case]:
    return [Case(OPERATOR, str(shape), partial(build, shape), shape=shape) for shape in SHAPES[device]]
