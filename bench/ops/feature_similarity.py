"""Label gradients from feature similarity, ``(h_u h_H^T + 1) r_H``."""

from functools import partial

import torch
from torch import Tensor

import fastmeta
from bench import kernels
from bench.case import Case, Error, Gemm, Workload, checked_rows, distance_to, workload_on_sets
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


def build(shape: Shape, dtype: torch.dtype, device: str) -> Workload:
    n, d, c = shape
    orders = [("eager h (h' r)", product_order), ("eager (h h') r", gram_order)]
    products = Gemm(d, n, c, "tn"), Gemm(n, d, c, "nn")
    if 4 * n * d * c > 2 * n * n * (d + c):  # the cheaper order is the floor's, and torch.compile's
        orders.reverse()
        products = Gemm(n, d, n, "nt"), Gemm(n, n, c, "nn")

    def error(first: tuple[Tensor, ...]) -> Error:
        rows = checked_rows(n, max(c, d), device)
        return distance_to(product_order(first[0][rows].double(), first[1].double(), first[2].double()), rows)

    return workload_on_sets(
        fastmeta.ops.feature_similarity,
        kernels.offered(OPERATOR, c, device, dtype),
        [*orders, ("eager multi_dot", multi_dot)],
        partial(arguments, shape, dtype, device),
        error,
        n * c * dtype.itemsize,
        products,
        dtype,
        device,
    )


def cases(device: str) -> list[Case]:
    return [Case(OPERATOR, str(shape), partial(build, shape), shape=shape) for shape in SHAPES[device]]
