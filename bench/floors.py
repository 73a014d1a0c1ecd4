"""The least time of a computation on the device at hand, under ceilings that are measured there."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from bench.case import Gemm, Variant
from bench.clock import Clock, interleave
from bench.rows import Row, best_known_us

GEMM_SIZE = {"cpu": 2048, "cuda": 8192}  # of the square product whose rate is the ceiling
# Bytes that move in one copy, read and write together: from inside a cache to far beyond the last one.
COPY_BYTES = {
    "cpu": (2**19, 2**21, 2**23, 2**25, 2**28),
    "cuda": (2**20, 2**22, 2**24, 2**25, 2**26, 2**28, 2**30, 2**32),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAUNCHES = 64
_SETS_BYTES = 2**28  # of operands in turn, several times an L2 cache


@dataclass(frozen=True)
class Ceilings:
    """GEMM rate in FLOP/s by dtype, copy bandwidth in B/s by size, microseconds of an empty launch."""

    gemm: dict[str, float]
    copy: dict[int, float]
    launch_us: dict[str, float] = field(default_factory=lambda: {"stream": 0.0, "graph": 0.0})

    def bandwidth(self, working_set: float) -> float:
        """The best copy rate among the measured sizes that are at least this large: a smaller one is not slower."""
        larger = [rate for size, rate in self.copy.items() if size >= working_set]
        return max(larger) if larger else self.copy[max(self.copy)]

    def parts_us(self, cost: Row, dtype: str, *, graph: bool) -> dict[str, float]:
        """``flops / GEMM rate``, ``bytes / copy bandwidth`` and one empty launch: the floor is the longest."""
        # A dtype with no fast instructions can be converted to float32 first.
        rate = max(self.gemm.get(dtype, 0.0), self.gemm["float32"])
        bandwidth = self.bandwidth(cost["working_set"] or cost["bytes"])
        launch = self.launch_us["graph" if graph else "stream"]
        return {"flops": 1e6 * cost["flops"] / rate, "bytes": 1e6 * cost["bytes"] / bandwidth, "launch": launch}

    def best_of(self, other: "Ceilings") -> "Ceilings":
        """Two passes of one run joined: a ceiling is what the machine can do."""
        return Ceilings(
            {dtype: max(rate, other.gemm.get(dtype, -math.inf)) for dtype, rate in self.gemm.items()},
            {size: max(rate, other.copy.get(size, -math.inf)) for size, rate in self.copy.items()},
            {where: min(us, other.launch_us[where]) for where, us in self.launch_us.items()},
        )

    def apply(self, record: Row) -> None:
        """Floors of a record that was measured, and each time as a multiple of them."""
        if "cost" not in record:
            return
        cost, dtype = record["cost"], record["dtype"]
        inside, stream = (self.parts_us(cost, dtype, graph=graph) for graph in (True, False))
        cost["copy_us"], cost["row_us"] = inside["bytes"], 1e6 * cost["row_bytes"] / self.bandwidth(cost["row_bytes"])
        cost["launch_us"] = inside["launch"]
        cost["bound"] = max(inside, key=inside.__getitem__)
        cost["floor_us"], cost["floor_stream_us"] = max(inside.values()), max(stream.values())
        for variant in record["variants"]:
            if "stream_us" in variant:
                variant["stream_times_floor"] = variant["stream_us"] / cost["floor_stream_us"]
                variant["times_floor"] = best_known_us(variant) / cost["floor_us"]

    def as_json(self) -> dict[str, Any]:
        copy = {str(size): rate for size, rate in self.copy.items()}
        return {"peak_flops": self.gemm, "copy_bytes_per_s": copy, "launch_us": self.launch_us}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "Ceilings":
        copy = {int(size): rate for size, rate in saved["copy_bytes_per_s"].items()}
        return cls(saved["peak_flops"], copy, saved["launch_us"])


def measure_ceilings(
    clock: Clock, *, copy_bytes: tuple[int, ...] | None = None, gemm_size: int | None = None, rounds: int = 7
) -> Ceilings:
    """The best sample of each."""
    size = gemm_size or GEMM_SIZE[clock.device]
    square = Gemm(size, size, size, "nn")
    gemm = {}
    for name, dtype in DTYPES.items():
        a, b = square.operands(dtype, clock.device)
        gemm[name] = 1e6 * square.flops / best_us(clock, partial(torch.mm, a, b, out=torch.empty_like(a)), rounds)
    copy = {}
    for num_bytes in copy_bytes or COPY_BYTES[clock.device]:
        source, target = (torch.ones(num_bytes // 8, device=clock.device) for _ in range(2))
        # On a GPU a kernel may move more than the driver's own copy.
        calls = [partial(target.copy_, source), partial(torch.neg, source, out=target)]
        copy[num_bytes] = 1e6 * num_bytes / min(best_us(clock, call, rounds) for call in calls)
    if clock.device != "cuda":
        return Ceilings(gemm, copy)
    empty: Callable[[], object] = partial(torch.cuda._sleep, 0)
    stream = _fastest_us(clock, empty, LAUNCHES, rounds)
    return Ceilings(gemm, copy, {"stream": stream, "graph": best_us(clock, empty, rounds)})


class Products:
    """The library's own time for products, measured once each; operands in turn, so that no cache holds them all."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._us: dict[tuple[Gemm, torch.dtype], float] = {}

    def us(self, gemm: Gemm, dtype: torch.dtype) -> float:
        if (gemm, dtype) not in self._us:
            device = self.clock.device
            a, b = gemm.operands(dtype, device)
            held = (a.numel() + b.numel()) * a.element_size()
            count = max(1, min(8, _SETS_BYTES // held)) if device == "cuda" else 1
            sets = [(a, b), *(gemm.operands(dtype, device) for _ in range(count - 1))]
            out = torch.empty(gemm.rows, gemm.columns, dtype=dtype, device=device)

            def all_sets() -> None:
                for one in sets:
                    torch.mm(*one, out=out)

            self._us[gemm, dtype] = best_us(self.clock, all_sets, 5) / count
        return self._us[gemm, dtype]


def best_us(clock: Clock, call: Callable[[], object], rounds: int) -> float:
    """The fastest sample; without the host's part where there are graphs."""
    once = _fastest_us(clock, call, 1, rounds)
    calls = max(1, min(LAUNCHES, int(1_000 / max(once, 1.0))))
    replay = clock.capture(call, calls)
    return once if replay is None else min(once, _fastest_us(clock, replay, 1, rounds) / calls)


def _fastest_us(clock: Clock, call: Callable[[], object], at_least: int, rounds: int) -> float:
    call()

    def sampler(one: Variant, calls: int) -> tuple[float, bool]:
        return clock.sampler(one, max(calls, at_least))

    timed = [Variant("", call)]
    timing = interleave(timed, rounds=rounds, min_sample_s=2e-3, budget_s=0.3, sampler=sampler)[0]
    return min(timing.samples_us)
