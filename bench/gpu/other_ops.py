"""The other operators: feature similarity, the label step, the solver, lists of tensors and the table."""

from functools import partial

import torch
from torch import Tensor

import fastmeta
from bench.case import TOLERANCE, Problem, bytes_of
from bench.gpu import forms
from bench.gpu.case import GpuCase, checked_rows, distance_of_rows, number_of_sets, variants
from bench.gpu.floors import Gemm
from bench.gpu.last_layer import SHAPES
from bench.inputs import NETWORKS, Shape
from bench.ops import (
    alignment_direction,
    feature_similarity,
    finite_difference_labels,
    masked_adam,
    perturbed,
    solve_hessian,
)
from bench.roofline import Cost

# Rows enough to fill the memory system, for the label step as a share of the copy bandwidth.
BANDWIDTH_ROWS = ((65536, 256), (32768, 1000), (8192, 4000))
TOL = 1e-2  # of the solver


def _normal(generator: torch.Generator, dtype: torch.dtype, *size: int) -> Tensor:
    return torch.randn(size, generator=generator, device=generator.device).to(dtype)


def similarity_arguments(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor, ...]:
    n, d, c = shape
    generator = torch.Generator(device).manual_seed(seed)
    h_u, h_h = (_normal(generator, dtype, n, d) for _ in range(2))
    residual = _normal(generator, torch.float32, n, c).softmax(-1)
    residual[torch.arange(n), torch.arange(n) % c] -= 1
    return h_u, h_h, residual.to(dtype)


def similarity_products(shape: Shape) -> tuple[Gemm, ...]:
    """Of the cheaper order."""
    n, d, c = shape
    if 4 * n * d * c <= 2 * n * n * (d + c):
        return Gemm(d, n, c, "tn"), Gemm(n, d, c, "nn")
    return Gemm(n, d, n, "nt"), Gemm(n, n, c, "nn")


def build_similarity(shape: Shape, dtype: torch.dtype, device: str) -> Problem:
    first = similarity_arguments(shape, dtype, device, 0)
    moved = bytes_of(*first, first[2])
    sets = [first] + [
        similarity_arguments(shape, dtype, device, seed) for seed in range(1, number_of_sets(moved, device))
    ]
    eager = [
        ("eager h (h' r)", feature_similarity.product_order),
        ("eager (h h') r", feature_similarity.gram_order),
        ("eager multi_dot", feature_similarity.multi_dot),
    ]
    if similarity_products(shape)[0].kind == "nt":
        eager[:2] = reversed(eager[:2])  # torch.compile gets the cheaper one
    rows = checked_rows(shape.n, max(shape.c, shape.d), device)
    truth = feature_similarity.product_order(first[0][rows].double(), first[1].double(), first[2].double())
    products = similarity_products(shape)
    return Problem(
        variants(fastmeta.ops.feature_similarity, forms.offered("feature_similarity", shape.c, device), eager, sets),
        distance_of_rows(truth, rows),
        Cost(sum(gemm.flops for gemm in products), moved, len(sets) * moved),
        TOLERANCE[dtype],
        shape.n,
    )


def label_step(plus: Tensor, minus: Tensor, y: Tensor, epsilon: Tensor, impl: str | None = None) -> Tensor:
    return fastmeta.ops.finite_difference_labels(plus, minus, y, epsilon, step=finite_difference_labels.STEP, impl=impl)


def label_step_arguments(n: int, c: int, dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(seed)
    plus, minus = (_normal(generator, dtype, n, c) for _ in range(2))
    labels = _normal(generator, torch.float32, n, c).softmax(-1).to(dtype)
    return plus, minus, labels, torch.tensor(finite_difference_labels.EPSILON, device=device)


def build_label_step(n: int, c: int, dtype: torch.dtype, device: str) -> Problem:
    first = label_step_arguments(n, c, dtype, device, 0)
    moved = bytes_of(*first, first[0])
    sets = [first] + [
        label_step_arguments(n, c, dtype, device, seed) for seed in range(1, number_of_sets(moved, device))
    ]
    rows = checked_rows(n, c, device)
    plus, minus, labels, epsilon = first
    truth = finite_difference_labels.eager(plus[rows].double(), minus[rows].double(), labels[rows].double(), epsilon)
    return Problem(
        variants(
            label_step,
            forms.offered("finite_difference_labels", c, device),
            [("eager", finite_difference_labels.eager)],
            sets,
        ),
        distance_of_rows(truth, rows),
        Cost(0, moved, len(sets) * moved),
        TOLERANCE[dtype],
        n,
    )


def _cases() -> list[GpuCase]:
    fp32 = (torch.float32,)
    similarity = [
        GpuCase("feature_similarity", str(s), partial(build_similarity, s), similarity_products(s), shape=s)
        for s in SHAPES
    ]
    rows = [(s.n, s.c) for s in SHAPES] + list(BANDWIDTH_ROWS)
    steps = [GpuCase("finite_difference_labels", f"{n}, {c}", partial(build_label_step, n, c)) for n, c in rows]
    solves = [
        GpuCase(
            "solve_hessian",
            f"{s}, tol {TOL:g}",
            partial(solve_hessian.build, s, TOL),
            (Gemm(s.n, s.d, s.c, "nt"), Gemm(s.c, s.n, s.d, "tn")),  # one product with the Hessian
            fp32,
            main="fastmeta cg",
        )
        for s in SHAPES[:4]
    ]
    # Lists are not rotated: ResNet-50's are larger than any L2, WRN-28-2's are measured within it.
    lists = [GpuCase("perturbed", name, partial(perturbed.build, name), dtypes=fp32) for name in NETWORKS]
    lists += [GpuCase("alignment_direction", name, partial(alignment_direction.build, name)) for name in NETWORKS]
    table = GpuCase("masked_adam_", "768 of 1,281,167", partial(masked_adam.build, 1_281_167, 768), dtypes=fp32)
    return [*similarity, *steps, *solves, *lists, table]


CASES = _cases()
