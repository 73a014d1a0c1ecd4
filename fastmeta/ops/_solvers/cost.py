"""Prices of the solvers in seconds: flops at measured rates plus an overhead for each call.

Rates are those of one Zen 4 core in float32; elsewhere the ratios matter, not the seconds.
"""

import math
from typing import NamedTuple

from fastmeta.ops._solvers.cholesky import MAX_ENTRIES, block_shape

GEMM = 1.0e11  # flop/s
DOUBLE_GEMM = 4.0e10  # flop/s in float64, where the dense Hessian lives
DOUBLE_CHOLESKY = 2.0e10  # flop/s
QR = 6.5e10  # flop/s
ELEMENT = 5e-10  # s an entry, in a pass over memory
CALL = 1.2e-6  # s, one small tensor operation
PRODUCT = 4e-6  # s, one Hessian-vector product of a small system
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


def eigh(n: int) -> float:
    """Eigenvectors of a symmetric ``[n, n]``: n^2 while its panels fit the cache, n^3 later."""
    return 1e-5 + 2e-8 * n**2 + 8.5e-11 * n**3


def product(size: Size) -> float:
    """One Hessian-vector product: two GEMMs and a row function (as long as 20 flops of GEMM an entry)."""
    return PRODUCT + size.n * size.c * (4 * size.k + 20) / GEMM


def cg(size: Size) -> Price:
    """Plain CG."""
    return Price(0.0, product(size) + 6 * CALL + 3 * ELEMENT * size.c * size.k)


def cg_in_span_pays(size: Size) -> bool:
    """Whether plain CG should first change to N coordinates."""
    return CG_ITERATIONS * (cg(size).iteration - cg(size.in_span).iteration) > span(size)


def softmax_factor_pays(size: Size) -> bool:
    """Whether a rotation of the outputs would cost a third of a Hessian-vector product, or more."""
    return 3 * size.c > size.n


def pcg(size: Size, loss: str, *, kept_basis: bool = False, kept_output: bool = False) -> Price:
    """CG with the Kronecker factors, in the span of the rows if that is smaller."""
    inside = size.in_span
    rotated = loss in ("cross_entropy", "mse_probs") and not softmax_factor_pays(size)
    setup = 60 * CALL + 2 * size.n * inside.k**2 / GEMM  # the rows in the basis
    if not kept_basis:
        setup += span(size) + 2 * size.n * inside.k**2 / GEMM + eigh(inside.k)
    setup += 4 * size.c * inside.k * size.k / GEMM  # there and back
    if rotated and not kept_output:
        setup += 2 * size.n * size.c**2 / GEMM + eigh(size.c)
    apply = 3 * CALL + ELEMENT * size.c * inside.k + (4 * size.c**2 * inside.k / GEMM if rotated else 0.0)
    return Price(setup, cg(inside).iteration + apply)


def cholesky(size: Size, loss: str) -> float:
    """Dense assembly, factorization and one solve; infinite where the matrix would not be held."""
    inside = size.in_span
    count, dim = block_shape(loss, inside.c, inside.k)
    if count * dim**2 > MAX_ENTRIES:
        return math.inf
    assembled = 1 if loss == "mse" else inside.c
    seconds = span(size) + (20 + 4 * assembled) * CALL
    seconds += assembled * (2 * size.n * inside.k**2 / DOUBLE_GEMM + 2 * ELEMENT * size.n * inside.k)
    if count == 1 and loss != "mse":
        seconds += 2 * size.n * dim**2 / DOUBLE_GEMM + 4 * ELEMENT * dim**2
    return seconds + count * dim**3 / 3 / DOUBLE_CHOLESKY


def pcg_iterations(decades: float) -> float:
    """Expected number of preconditioned iterations to bring the residual down by so many decades."""
    return 1 + PCG_PER_DECADE * max(decades, 0.0)
