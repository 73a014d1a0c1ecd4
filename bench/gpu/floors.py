"""The least time of a computation on the device at hand: its products, its bytes, one launch, all measured there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from bench.gpu.clock import Clock
from bench.roofline import Ceilings, Cost
from bench.timing import Timed, interleave

# Bytes that move in one copy, read and write together: within an L2 cache and far beyond one.
COPY_BYTES = (2**20, 2**22, 2**24, 2**25, 2**26, 2**28, 2**30, 2**32)
PEAK_SIZE = 8192  # of the square product that stands for the tensor cores' rate
LAUNCHES = 64


@dataclass(frozen=True)
class Gemm:
    """A product ``[rows, inner] [inner, columns]``, with the operands as an operator has them in memory.

    ``nt``: the right one is stored ``[columns, inner]`` (``h V^T``); ``tn``: the left one ``[inner, rows]``
    (``R^T h``).
    """

    rows: int
    inner: int
    columns: int
    kind: Literal["nn", "nt", "tn"]

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.inner * self.columns

    def operands(self, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
        left = (self.inner, self.rows) if self.kind == "tn" else (self.rows, self.inner)
        right = (self.columns, self.inner) if self.kind == "nt" else (self.inner, self.columns)
        # Not zeros: a product of zeros draws less power and runs faster.
        a, b = torch.randn(left, device=device).to(dtype), torch.randn(right, device=device).to(dtype)
        return (a.T if self.kind == "tn" else a), (b.T if self.kind == "nt" else b)


@dataclass(frozen=True)
class Floor:
    """Microseconds that nothing can go below, and what binds."""

    gemm_us: float
    copy_us: float
    launch_us: float

    @property
    def us(self) -> float:
        return max(self.gemm_us, self.copy_us, self.launch_us)

    @property
    def bound(self) -> str:
        return {self.gemm_us: "GEMM", self.copy_us: "bytes", self.launch_us: "launch"}[self.us]


class Floors:
    """Ceilings of one device, measured once each and kept."""

    def __init__(self, clock: Clock, copy_bytes: Sequence[int] = COPY_BYTES, rounds: int = 5) -> None:
        self.clock, self.rounds = clock, rounds
        self._gemm_us: dict[tuple[Gemm, torch.dtype], float] = {}
        self.copy = {size: 1e6 * size / self._copy_us(size) for size in copy_bytes}
        self.launch_us, self.launch_graph_us = self._launches()

    def floor(self, gemms: Sequence[Gemm], cost: Cost, dtype: torch.dtype, *, graph: bool) -> Floor:
        """``max(products at cuBLAS's rate for their shape, bytes / copy bandwidth, one empty launch)``."""
        bandwidth = Ceilings({}, self.copy).bandwidth(cost.bytes if cost.working_set is None else cost.working_set)
        launch = self.launch_graph_us if graph else self.launch_us
        return Floor(sum(self.gemm_us(gemm, dtype) for gemm in gemms), 1e6 * cost.bytes / bandwidth, launch)

    def gemm_us(self, gemm: Gemm, dtype: torch.dtype) -> float:
        """Time of this product in cuBLAS, or whatever torch.mm takes."""
        if (gemm, dtype) not in self._gemm_us:
            a, b = gemm.operands(dtype, self.clock.device)
            out = torch.empty(gemm.rows, gemm.columns, dtype=dtype, device=self.clock.device)
            self._gemm_us[gemm, dtype] = self._best_us(partial(torch.mm, a, b, out=out))
        return self._gemm_us[gemm, dtype]

    def peak_flops(self, dtype: torch.dtype, size: int = PEAK_SIZE) -> float:
        """FLOP/s of a large square product."""
        square = Gemm(size, size, size, "nt")
        return 1e6 * square.flops / self.gemm_us(square, dtype)

    def _copy_us(self, size: int) -> float:
        source = torch.randint(0, 256, (size // 2,), dtype=torch.uint8, device=self.clock.device)
        return self._best_us(partial(torch.empty_like(source).copy_, source))

    def _launches(self) -> tuple[float, float]:
        """An empty kernel: one after the other on the stream, and in a graph."""
        if self.clock.device == "cuda":
            empty: Callable[[], object] = partial(torch.cuda._sleep, 0)
        else:
            empty = torch.ones(1, device=self.clock.device).zero_
        stream = self._samples_us(Timed(empty), LAUNCHES)
        replay = self.clock.capture(empty, LAUNCHES)
        return stream, stream if replay is None else self._samples_us(Timed(replay), 1) / LAUNCHES

    def _best_us(self, call: Callable[[], object]) -> float:
        """Without the host's part: in a graph, where there are graphs."""
        call()
        once_us = self._samples_us(Timed(call), 1)
        calls = max(1, min(LAUNCHES, int(1_000 / max(once_us, 1.0))))
        replay = self.clock.capture(call, calls)
        return once_us if replay is None else min(once_us, self._samples_us(Timed(replay), 1) / calls)

    def _samples_us(self, timed: Timed, at_least: int) -> float:
        timed.call()

        def sampler(one: Timed, calls: int) -> tuple[float, bool]:
            return self.clock.sampler(one, max(calls, at_least))

        timing = interleave([timed], rounds=self.rounds, min_sample_s=1e-3, budget_s=0.2, sampler=sampler)[0]
        return min(timing.samples_us)
