"""What one solve leaves for the next: its solution, and the factors of its preconditioner."""

import weakref

from torch import Tensor

from fastmeta.ops._solvers.coordinates import Coordinates
from fastmeta.ops._solvers.kronecker import OutputFactor

Rows = tuple[Tensor, ...]


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

    def drop_factors(self) -> None:
        """Forget the factors, keep the solution."""
        self.basis = self.output = self._span = None
        self._span_rows = ()
        self.age = 0

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
            "iterations_when_new": self.iterations_when_new,
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restore :meth:`state_dict`."""
        self.reset()
        output = state["output"]
        self.__dict__.update(state, output=None if output is None else OutputFactor(*output))  # type: ignore[misc]
