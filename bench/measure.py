"""Runs one case: every variant checked against float64, then timed in turn, on the stream and in graphs."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from bench.case import Case, Variant, Workload, dtype_name, l2_bytes
from bench.clock import Clock, Timing, ensure_healthy, interleave, reason_of
from bench.floors import Products
from bench.rows import GRAPH_BELOW_US, Row

GRAPH_US = 300.0  # of work in one graph, at least, in up to MAX_GRAPH_CALLS calls
MAX_GRAPH_CALLS = 48


@dataclass(frozen=True)
class Settings:
    """How long to measure."""

    rounds: int
    min_sample_s: float
    budget_s: float  # for the samples of one variant, on the stream and again in graphs
    min_rounds: int = 3


SETTINGS = {
    "cpu": Settings(rounds=9, min_sample_s=0.005, budget_s=1.5),
    "cuda": Settings(rounds=15, min_sample_s=0.001, budget_s=0.25),
}
QUICK = Settings(rounds=15, min_sample_s=0.0005, budget_s=0.05)
Announce = Callable[[str], None]  # told what is about to run, so that a crash can be laid to it
Running = list[tuple[Row, Variant]]


def measure_case(
    case: Case,
    dtypes: Sequence[torch.dtype],
    clock: Clock,
    products: Products,
    settings: Settings,
    *,
    left_out: Mapping[str, str] | None = None,
    announce: Announce = lambda name: None,
) -> list[Row]:
    """A record for each dtype, their variants in one round robin.

    Args:
        case: the operator and shape.
        dtypes: of its arguments.
        clock: of the device.
        products: the library's time for products there.
        settings: how long to measure.
        left_out: variants that are not run, and why.
        announce: called before each step that runs code under test.
    """
    start = time.monotonic()
    records: list[Row] = []
    running: Running = []
    for dtype in dtypes:
        announce("inputs")
        workload = case.build(dtype, clock.device)
        record = new_record(case, dtype) | {"note": case.note, "variants": []}
        for variant in workload.variants:
            announce(variant.name)
            reason = (left_out or {}).get(variant.name)
            entry: Row = {"name": variant.name, "role": variant.role, "note": variant.note}
            entry |= {"status": "left out", "reason": reason} if reason else _checked(workload, variant, clock)
            record["variants"].append(entry)
            if entry["status"] == "measured":
                running.append((entry, variant))
        announce("products alone")
        record["cost"] = _cost(workload, dtype, clock, products)
        records.append(record)
    announce("timing")
    for (entry, variant), timing in zip(running, _interleave(running, clock, settings), strict=True):
        _add_times(entry, timing)
        announce(f"{variant.name}: host time and memory")
        with variant.entered():
            variant.call()
            if timing.median_us < GRAPH_BELOW_US:
                entry["host_us"] = clock.host_us(variant.call)
            if variant.examples is None:
                entry["peak_bytes"] = clock.peak_bytes(variant.call)
    _graphs(running, clock, settings, announce)
    torch.compiler.reset()  # the next shape is compiled for itself
    for record in records:
        record["seconds"] = time.monotonic() - start
    return records


def new_record(case: Case, dtype: torch.dtype) -> Row:
    start = {"key": case.key(dtype), "operator": case.operator, "shape": case.label, "dtype": dtype_name(dtype)}
    return start | {"main": case.main}


def _interleave(running: Running, clock: Clock, settings: Settings) -> list[Timing]:
    return interleave([variant for _, variant in running], sampler=clock.sampler, **asdict(settings))


def _checked(workload: Workload, variant: Variant, clock: Clock) -> Row:
    """The first call: its error against float64, and why the variant is left out, if it is."""
    try:
        with variant.entered():
            result = variant.result()
            found: Row = {"error": workload.error(result), "tolerance": workload.tolerance}
            found |= variant.describe(result) if variant.describe else {}
            if variant.role == "fastmeta":
                found["host_syncs"] = clock.host_syncs(variant.call)
    except Exception as error:  # a variant that cannot do this case must not end the run
        ensure_healthy(clock.device)
        return {"status": "failed", "reason": reason_of(error)}
    if variant.examples is not None:
        found["extrapolated"] = {"measured_examples": variant.examples, "all_examples": workload.num_examples}
    if not found["error"] <= workload.tolerance:
        reason = f"error {found['error']:.1e} against float64, over {workload.tolerance:.1e}"
        return found | {"status": "wrong", "reason": reason}
    return found | {"status": "measured"}


def _add_times(entry: Row, timing: Timing) -> None:
    factor = 1.0
    if "extrapolated" in entry:
        factor = entry["extrapolated"]["all_examples"] / entry["extrapolated"]["measured_examples"]
    entry |= {"stream_us": factor * timing.median_us, "quartiles_us": [factor * q for q in timing.quartiles_us]}
    entry["p20_p80_us"] = [factor * q for q in timing.quantiles_us(5)]
    entry |= timing.counts()


def _graphs(running: Running, clock: Clock, settings: Settings, announce: Announce) -> None:
    """The same calls in CUDA graphs: what the device alone takes."""
    captured: Running = []
    calls_of: list[int] = []
    for entry, variant in running:
        if not variant.graph or entry["stream_us"] >= GRAPH_BELOW_US:
            continue
        announce(f"{variant.name}: graph")
        calls = max(1, min(MAX_GRAPH_CALLS, int(GRAPH_US / entry["stream_us"]) + 1))
        try:
            with variant.entered():
                replay = clock.capture(variant.call, calls)
        except Exception as error:  # it waits for the device, or has another way that a graph cannot hold
            entry["graph_reason"] = reason_of(error)
            ensure_healthy(clock.device)
            continue
        if replay is not None:
            captured.append((entry, Variant(variant.name, replay)))
            calls_of.append(calls)
    announce("timing of graphs")
    for (entry, _), calls, timing in zip(captured, calls_of, _interleave(captured, clock, settings), strict=True):
        entry["graph_us"] = timing.median_us / calls
        entry["graph_quartiles_us"] = [q / calls for q in timing.quartiles_us]
        entry["graph_p20_p80_us"] = [q / calls for q in timing.quantiles_us(5)]


def _cost(workload: Workload, dtype: torch.dtype, clock: Clock, products: Products) -> Row:
    cost = workload.cost
    spread = cost.bytes if cost.working_set is None else cost.working_set
    return {
        **{name: getattr(cost, name) for name in ("flops", "bytes", "working_set", "row_bytes")},
        "gemm_us": sum(products.us(gemm, dtype) for gemm in cost.products),
        "in_l2": spread < l2_bytes(clock.device),
    }
