"""Runs one case: every variant checked against float64, then timed in turn, on the stream and in graphs."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from bench.case import Case, Problem, Variant, dtype_name, l2_bytes
from bench.clock import Clock, ensure_healthy
from bench.floors import Products
from bench.rows import GRAPH_BELOW_US, Row
from bench.timing import Timed, Timing, interleave

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
        problem = case.build(dtype, clock.device)
        record: Row = {"key": case.key(dtype), "operator": case.operator, "shape": case.label}
        record |= {"dtype": dtype_name(dtype), "main": case.main, "note": case.note, "variants": []}
        for variant in problem.variants:
            announce(variant.name)
            reason = (left_out or {}).get(variant.name)
            entry: Row = {"name": variant.name, "role": variant.role, "note": variant.note}
            entry |= {"status": "left out", "reason": reason} if reason else _checked(problem, variant, clock)
            record["variants"].append(entry)
            if entry["status"] == "measured":
                running.append((entry, variant))
        announce("products alone")
        record["cost"] = _cost(problem, dtype, clock, products)
        records.append(record)
    announce("timing")
    for (entry, variant), timing in zip(running, _interleave(running, clock, settings), strict=True):
        _add_times(entry, timing)
        announce(f"{variant.name}: host time and memory")
        with variant.around(), torch.set_grad_enabled(variant.grad):
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


def _interleave(running: Running, clock: Clock, settings: Settings) -> list[Timing]:
    timed = [Timed(variant.call, variant.grad, variant.around) for _, variant in running]
    return interleave(timed, sampler=clock.sampler, **asdict(settings))


def _checked(problem: Problem, variant: Variant, clock: Clock) -> Row:
    """The first call: its error against float64, and why the variant is left out, if it is."""
    try:
        with variant.around(), torch.set_grad_enabled(variant.grad):
            if variant.prepare is not None:
                variant.prepare()
            result = (variant.check or variant.call)()
            found: Row = {"error": problem.error(result), "tolerance": problem.tolerance}
            found |= variant.describe(result) if variant.describe else {}
            if variant.role == "fastmeta":
                found["host_syncs"] = clock.host_syncs(variant.call)
    except Exception as error:  # a variant that cannot do this case must not end the run
        ensure_healthy(clock.device)
        return {"status": "failed", "reason": f"{type(error).__name__}: {error}".splitlines()[0]}
    if variant.examples is not None:
        found["extrapolated"] = {"measured_examples": variant.examples, "all_examples": problem.num_examples}
    if not found["error"] <= problem.tolerance:
        reason = f"error {found['error']:.1e} against float64, over {problem.tolerance:.1e}"
        return found | {"status": "wrong", "reason": reason}
    return found | {"status": "measured"}


def _add_times(entry: Row, timing: Timing) -> None:
    factor = 1.0
    if "extrapolated" in entry:
        factor = entry["extrapolated"]["all_examples"] / entry["extrapolated"]["measured_examples"]
    entry |= {"stream_us": factor * timing.median_us, "quartiles_us": [factor * q for q in timing.quartiles_us]}
    entry["p20_p80_us"] = [factor * q for q in p20_p80(timing.samples_us)]
    entry |= {"samples": len(timing.samples_us), "calls_per_sample": timing.calls}
    entry |= {"rejected_samples": timing.rejected, "contended_samples": timing.contended}


def p20_p80(samples: list[float]) -> tuple[float, float]:
    if len(samples) < 2:
        return samples[0], samples[0]
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return fifths[0], fifths[3]


def _graphs(running: Running, clock: Clock, settings: Settings, announce: Announce) -> None:
    """The same calls in CUDA graphs: what the device alone takes."""
    captured: list[tuple[Row, int, Variant]] = []
    for entry, variant in running:
        if not variant.graph or entry["stream_us"] >= GRAPH_BELOW_US:
            continue
        announce(f"{variant.name}: graph")
        calls = max(1, min(MAX_GRAPH_CALLS, int(GRAPH_US / entry["stream_us"]) + 1))
        try:
            with variant.around(), torch.set_grad_enabled(variant.grad):
                replay = clock.capture(variant.call, calls)
        except Exception as error:  # it waits for the device, or has another way that a graph cannot hold
            entry["graph_reason"] = f"{type(error).__name__}: {error}".splitlines()[0]
            ensure_healthy(clock.device)
            continue
        if replay is not None:
            captured.append((entry, calls, Variant(variant.name, replay)))
    announce("timing of graphs")
    replays = _interleave([(entry, replay) for entry, _, replay in captured], clock, settings)
    for (entry, calls, _), timing in zip(captured, replays, strict=True):
        entry["graph_us"] = timing.median_us / calls
        entry["graph_quartiles_us"] = [q / calls for q in timing.quartiles_us]
        entry["graph_p20_p80_us"] = [q / calls for q in p20_p80(timing.samples_us)]


def _cost(problem: Problem, dtype: torch.dtype, clock: Clock, products: Products) -> Row:
    cost = problem.cost
    spread = cost.bytes if cost.working_set is None else cost.working_set
    return {
        "flops": cost.flops,
        "bytes": cost.bytes,
        "working_set": cost.working_set,
        "row_bytes": cost.row_bytes,
        "gemm_us": sum(products.us(gemm, dtype) for gemm in cost.products),
        "in_l2": spread < l2_bytes(clock.device),
    }
