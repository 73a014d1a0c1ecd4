"""Prices of the solvers in seconds: flops at measured rates plus an overhead for each call.

Rates are those of two Zen 4 cores in float32; on other machines the ratios matter, not the seconds.
"""

import math
from typing import NamedTuple

from fastmeta.ops._solvers.cholesky import MAX_ENTRIES, block_shape

GEMM = 2.0e11  # flop/s
DOUBLE_GEMM = 0.8e11  # flop/s, the assembly and factorization of the dense Hessian in float64
QR = 1.2e11  # flop/s
EIGH = 1.0e10  # n^3/s
CALL = 4e-6  # s, one small tensor operation
PRODUCT = 2.5e-5  # s, one Hessian-vector product of a small system
# Prior for the preconditioned iterations of one decade of the residual; plain CG is measured while it runs.
PCG_PER_DECADE = 4.0
# Prior for CG where its number of iterations must be guessed: whether the span of the rows pays.
CG_ITERATIONS = 40


class Price(NamedTuple):
    """Seconds before the first iteration, and for each."""

    setup: float
    iteration: float


class Size(NamedTuple):
    """N examples, C outputs, K features with the bias."""

    n: int
    c: int
    k: int

    @property
    def in_span(self) -> "Size":
        """In coordinates of the rows' span."""
        return self._replace(k=min(self.n, self.k))


def span(size: Size) -> float:
    """QR of the rows, and three changes of coordinates of a ``[C, K]`` matrix."""
    if size.n >= size.k:
        return 0.0
    return 4 * size.n**2 * size.k / QR + 6 * size.c * size.k * size.n / GEMM


def product(size: Size) -> float:
    """One Hessian-vector product: two GEMMs and a row function (about 20 flops of GEMM an entry)."""
    return PRODUCT + size.n * size.c * (4 * size.k + 20) / GEMM


def cg(size: Size) -> Price:
    """Plain CG."""
    return Price(0.0, product(size) + 7 * CALL + 10 * size.c * size.k / GEMM)


def cg_in_span_pays(size: Size) -> bool:
    """Whether plain CG should first change to N coordinates."""
    return CG_ITERATIONS * (cg(size).iteration - cg(size.in_span).iteration) > span(size)


def pcg(size: Size, loss: str, *, kept_basis: bool = False, kept_output: bool = False) -> Price:
    """CG with the Kronecker factors, in the span of the rows if that is smaller."""
    inside = size.in_span
    diagonal = loss in ("mse", "binary_cross_entropy")
    setup = 10 * CALL + 2 * size.n * inside.k**2 / GEMM
    if not kept_basis:
        setup += span(size) + 2 * size.n * inside.k**2 / GEMM + inside.k**3 / EIGH
    setup += 4 * size.c * inside.k * size.k / GEMM
    if not diagonal and not kept_output:
        setup += 2 * size.n * size.c**2 / GEMM + size.c**3 / EIGH
    apply = 4 * CALL + (0.0 if diagonal else 4 * size.c**2 * inside.k / GEMM)
    return Price(setup, cg(inside).iteration + apply)


def cholesky(size: Size, loss: str) -> float:
    """Dense assembly, factorization and one solve; infinite where the matrix would not be held."""
    inside = size.in_span
    count, dim = block_shape(loss, inside.c, inside.k)
    if count * dim**2 > MAX_ENTRIES:
        return math.inf
    assembled = 1 if loss == "mse" else inside.c
    flops = 2 * size.n * assembled * inside.k**2 + count * dim**3 / 3
    if count == 1 and loss != "mse":
        flops += 2 * size.n * dim**2 + 20 * dim**2
    return span(size) + (20 + 3 * assembled) * CALL + flops / DOUBLE_GEMM


def pcg_iterations(decades: float) -> float:
    """Expected number of preconditioned iterations to bring the residual down by so many decades."""
    return 1 + PCG_PER_DECADE * max(decades, 0.0)
