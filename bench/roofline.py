"""Ceilings of the machine, measured, and the least time a computation can take under them."""

import math
from dataclasses import dataclass
from functools import partial

import torch

from bench.timing import Timed, interleave

GEMM_SIZE = 2048
# Bytes that move in one copy, read and write together: inside a core's cache up to main memory.
COPY_BYTES = (2**19, 2**21, 2**23, 2**25, 2**28)


@dataclass(frozen=True)
class Cost:
    """What a computation cannot avoid: multiply-adds counted twice, every operand read once, every result written once.

    ``working_set`` is the memory the bytes are spread over, where that is more than the bytes themselves.
    """

    flops: float
    bytes: float
    working_set: float | None = None


@dataclass(frozen=True)
class Ceilings:
    """GEMM rate in FLOP/s for each dtype, and copy bandwidth in B/s for each size of copy."""

    gemm: dict[str, float]
    copy: dict[int, float]

    def bandwidth(self, working_set: float) -> float:
        """The best copy rate among the measured sizes that are at least this large: a smaller one is not slower."""
        larger = [rate for size, rate in self.copy.items() if size >= working_set]
        return max(larger) if larger else self.copy[max(self.copy)]

    def floor_us(self, cost: Cost, dtype: str) -> float:
        """``max(flops / GEMM rate, bytes / copy bandwidth)`` in microseconds."""
        # A dtype with no fast instructions can be converted to float32 first.
        rate = max(self.gemm.get(dtype, 0.0), self.gemm["float32"])
        bandwidth = self.bandwidth(cost.bytes if cost.working_set is None else cost.working_set)
        return 1e6 * max(cost.flops / rate, cost.bytes / bandwidth)


def measure_ceilings(rounds: int = 7, gemm_size: int = GEMM_SIZE) -> Ceilings:
    """The best sample of each: a ceiling is what the machine can do, not what it does on average."""
    calls: list[Timed] = []
    dtypes = (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        a, b, out = (torch.ones(gemm_size, gemm_size, dtype=dtype) for _ in range(3))
        calls.append(Timed(partial(torch.mm, a, b, out=out)))
    for size in COPY_BYTES:
        source, target = torch.ones(size // 8), torch.ones(size // 8)
        calls.append(Timed(partial(target.copy_, source)))
    best = [1e-6 * min(timing.samples_us) for timing in interleave(calls, rounds=rounds)]
    gemm = {str(d).removeprefix("torch."): 2 * gemm_size**3 / t for d, t in zip(dtypes, best, strict=False)}
    copy = {size: size / t for size, t in zip(COPY_BYTES, best[len(dtypes) :], strict=True)}
    return Ceilings(gemm, copy)


def best_of(first: Ceilings, second: Ceilings) -> Ceilings:
    """Two passes of one run joined."""
    return Ceilings(
        {dtype: max(rate, second.gemm.get(dtype, -math.inf)) for dtype, rate in first.gemm.items()},
        {size: max(rate, second.copy.get(size, -math.inf)) for size, rate in first.copy.items()},
    )
