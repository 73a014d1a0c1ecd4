"""Kronecker-factored preconditioner: ``H ~ B (x) A``, inverted with its damping in the eigenbases of A and B.

Martens and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", split the damping
between the factors; in the eigenbases there is nothing to split. The curvature of the outputs, of which B is the mean,
is written out: ``C_i = diag(d_i) - s_i p_i^T - p_i s_i^T`` (:class:`fastmeta.losses.OutputCurvature`).
"""

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmeta.losses import OutputCurvature
from fastmeta.ops.solve.system import Coordinates, Joined

Rows = tuple[Tensor, ...]

# Products of cubes that an eigendecomposition is worth, measured on a CPU.
EIGENDECOMPOSITION = 12
# Iterations that a preconditioned solve takes, of what auto grants plain CG before it.
FEW = 20


def mean_curvature(curvature: OutputCurvature, weights: Tensor, joined: Joined | None = None) -> Tensor:
    """``B = sum_i w_i C_i / sum_i w_i`` for weights >= 0 ``[N]``. ``[C, C]``."""
    weights = weights / _total(weights, joined)
    d, s, p = curvature
    mean = torch.diag(weights @ d)
    if s is not None and p is not None:
        mixed = (weights.unsqueeze(1) * s).T @ p
        mean = mean - mixed - mixed.T
    return mean if joined is None else joined.sum(mean)[0]


def mean_diagonal(curvature: OutputCurvature, weights: Tensor, joined: Joined | None = None) -> Tensor:
    """The diagonal of B, in one pass over the rows. ``[C]``."""
    d, s, p = curvature
    mean = weights / _total(weights, joined) @ (d if s is None or p is None else d - 2 * s * p)
    return mean if joined is None else joined.sum(mean)[0]


def _total(weights: Tensor, joined: Joined | None) -> Tensor:
    total = weights.sum() if joined is None else joined.sum(weights.sum())[0]
    return total.clamp_min(torch.finfo(weights.dtype).tiny)


def eigenbasis(inside: Coordinates, joined: Joined | None = None) -> Coordinates:
    """The eigenbasis of the second moment ``A = sum_i e_i e_i^T``.

    Raises:
        ValueError: ``A`` overflows.
    """
    e = inside.features
    moment = e.T @ e
    if joined is not None:
        (moment,) = joined.sum(moment)
    if not bool(moment.diagonal().sum().isfinite()):
        raise ValueError(f"features must be small enough for their second moment in {e.dtype}, which overflows")
    vectors = torch.linalg.eigh(moment).eigenvectors
    basis = vectors.T if inside.basis is None else vectors.T @ inside.basis
    return Coordinates(e @ vectors, basis.contiguous(), inside.complete)


class OutputFactor(NamedTuple):
    """The mean curvature of the outputs, B, in one of three forms.

    ``U diag(b) U^T``; ``diag(b)`` for a loss without mixed curvature; or ``diag(b) - b b^T / sum(b)``, the curvature of
    one softmax with probabilities ``b``: zero along (1, ..., 1) as B is, with the diagonal of B. It costs no product
    with a ``[C, C]`` matrix, neither to find nor to apply.
    """

    b: Tensor  # [C]
    vectors: Tensor | None = None  # U [C, C]
    softmax: bool = False


def output_factor(
    curvature: OutputCurvature, weights: Tensor, *, softmax: bool, joined: Joined | None = None
) -> OutputFactor:
    """Of examples with this curvature and absolute weights ``[N]``; ``softmax`` asks for the third form."""
    if curvature.s is None:
        return OutputFactor(mean_diagonal(curvature, weights, joined))
    if not softmax:
        values, vectors = torch.linalg.eigh(mean_curvature(curvature, weights, joined))
        return OutputFactor(values.clamp_min(0), vectors)
    diagonal = mean_diagonal(curvature, weights, joined)
    b = diagonal
    for _ in range(5):  # b - b^2 / sum(b) = diagonal
        b = diagonal / (1 - b / b.sum().clamp_min(torch.finfo(b.dtype).tiny)).clamp_min(0.1)
    return OutputFactor(b, softmax=True)


class KroneckerPreconditioner:
    """``R -> (B (x) A + damping I)^-1 R`` in coordinates where A is diagonal.

    The eigenvalues of A are read off the rows, ``a_j = sum_i e_ij^2``: exact for a basis made of these rows, and the
    best diagonal for a basis kept from earlier ones.

    Args:
        features: rows ``e_i`` in the eigenbasis of A, ``[N, r]``.
        output: the factor B.
        damping: as in the system; > 0 for the softmax form.
        joined: the processes that have the other rows; None if these are all.
    """

    def __init__(self, features: Tensor, output: OutputFactor, damping: float, joined: Joined | None = None) -> None:
        a = features.square().sum(0)
        if joined is not None:
            (a,) = joined.sum(a)
        product = output.b.unsqueeze(1) * a
        self._inverse = (product + damping).reciprocal()
        if damping == 0:
            # The range of H lies in the range of B (x) A; outside it the pseudo-inverse is 0. Along (1, ..., 1), and of
            # an output that no row ever has, B has what rounding left of 0.
            eps = torch.finfo(product.dtype).eps
            unseen = (output.b <= 8 * eps * len(output.b) * output.b.amax()).unsqueeze(1)
            self._inverse.masked_fill_(unseen | (product <= eps * max(product.shape) * product.amax()), 0.0)
        self._vectors = output.vectors
        self._b = output.b
        self._rank_one: Tensor | None = None
        if output.softmax:
            # Sherman-Morrison for each feature; sum_k b_k (1 - a b_k / (a b_k + damping)) without the cancellation.
            share = output.b.unsqueeze(1) * self._inverse
            share /= share.sum(0).clamp_min(torch.finfo(share.dtype).tiny)
            self._rank_one = share.mul_(a / damping)

    def __call__(self, residual: Tensor) -> Tensor:
        """``[C, r]``."""
        if self._vectors is not None:
            return self._vectors @ (self._vectors.T @ residual).mul_(self._inverse)
        z = residual * self._inverse
        if self._rank_one is not None:
            z.addcmul_(self._rank_one, (self._b @ z).expand_as(z))
        return z


def trial_iterations(n: int, c: int, k: int, *, in_row_space: bool, solves: int = 1) -> int:
    """Iterations of plain CG before ``auto`` turns to ``pcg`` on a CPU: those that cost what the other way would.

    Once a net has learned something both take the same number, as its mean curvature tells little of an example's;
    before, and for little damping, ``pcg`` may take a tenth. Whichever it is, ``auto`` takes about twice the time of
    the better one or less. (On a GPU it stays with CG: an eigendecomposition waits for the host.) Factors that
    ``solves`` solves can share, which takes as many rows as features, cost each a part.

    >>> [trial_iterations(512, 10, k, in_row_space=False) for k in (129, 641)]
    [42, 193]
    >>> trial_iterations(512, 10, 129, in_row_space=False, solves=10)
    22
    """
    rank = min(n, k)
    factors = EIGENDECOMPOSITION * (rank**3 + (c**3 if 3 * c <= n else 0)) + 4 * n * k * rank
    return FEW + factors // (2 * n * c * (n if in_row_space else 2 * k) * (solves if n >= k else 1))


class SolverState:
    """Carrier of warm starts between calls of :func:`fastmeta.ops.solve_hessian`.

    A solve with a state starts from the last solution and reuses the eigenbases of the preconditioner, which affect
    the number of iterations and never the result. They are recomputed every ``refresh_every`` solves, and earlier
    when a solve needs twice the iterations it needed when they were new. With fewer rows than features the basis of
    the rows' span can be reused only for the very same ``features`` and ``weights``; another batch computes its own.

    Args:
        refresh_every: number of solves that share the factors, >= 1.

    Raises:
        ValueError: ``refresh_every < 1``.

    >>> SolverState(refresh_every=5).solver is None
    True
    """

    def __init__(self, refresh_every: int = 10) -> None:
        if refresh_every < 1:
            raise ValueError(f"refresh_every must be >= 1, got {refresh_every}")
        self.refresh_every = refresh_every
        self.solver: str | None = None
        """The solver of the last call: ``auto`` writes its choice here."""
        self.solution: Tensor | None = None
        self.basis: Tensor | None = None
        self.output: OutputFactor | None = None
        self.age = 0
        self.iterations = 0
        """of the last solve that the host has seen"""
        self.iterations_when_new = 0
        self._span: Coordinates | None = None
        self._span_rows: tuple[tuple[weakref.ref[Tensor], int], ...] = ()
        # What CUDA graphs read and write here lives as long as the state, also after newer factors have come.
        self.in_graphs: list[tuple[Tensor | None, ...]] = []

    def reset(self) -> None:
        """Forget everything."""
        in_graphs = self.in_graphs
        self.__init__(self.refresh_every)  # type: ignore[misc]
        self.in_graphs = in_graphs

    @property
    def is_preconditioned(self) -> bool:
        """Whether the next solve has factors: an earlier one needed them, and they are not too old."""
        return self.output is not None and self.age < self.refresh_every

    def drop_factors(self) -> None:
        """Forget the factors, keep the solution."""
        self.basis = self.output = self._span = None
        self._span_rows = ()
        self.age = 0

    def most_in_graph(self, max_iter: int) -> int:
        """Iterations for a CUDA graph: twice those of the last solve, all where the host has seen none.

        Twice the iterations serve a condition number four times as large.
        """
        return min(max_iter, 2 * self.iterations + 2) if self.iterations else max_iter

    def span_of(self, rows: Rows, num_features: int) -> Coordinates | None:
        """Coordinates kept for exactly these tensors, unchanged since; K tells those with a bias from those without."""
        if self._span is None or self._span.basis is None or self._span.basis.shape[1] != num_features:
            return None
        same = len(self._span_rows) == len(rows) and all(
            kept() is tensor and version == tensor._version
            for (kept, version), tensor in zip(self._span_rows, rows, strict=True)
        )
        return self._span if same else None

    def keep_span(self, rows: Rows, coordinates: Coordinates) -> None:
        """Keep coordinates for as long as these tensors live unchanged."""
        # Changes of inference tensors are not counted.
        if not any(tensor.is_inference() for tensor in rows):
            self._span_rows = tuple((weakref.ref(tensor), tensor._version) for tensor in rows)
            self._span = coordinates

    def state_dict(self) -> dict[str, object]:
        """Everything that affects later solves of other rows, for a checkpoint."""
        return {
            "refresh_every": self.refresh_every,
            "solution": self.solution,
            "basis": self.basis,
            "output": None if self.output is None else tuple(self.output),
            "age": self.age,
            "iterations": self.iterations,
            "iterations_when_new": self.iterations_when_new,
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restore :meth:`state_dict`."""
        self.reset()
        output = state["output"]
        self.__dict__.update(state, output=None if output is None else OutputFactor(*output))  # type: ignore[misc]

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy, or one from a file, knows no tensor of the caller's and no graph.
        return _restored, (self.state_dict(),)


def _restored(state: dict[str, object]) -> SolverState:
    restored = SolverState()
    restored.load_state_dict(state)
    return restored
