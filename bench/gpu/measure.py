"""Runs one case on a device: every variant checked against float64, then timed in turn, on the stream and in graphs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bench.case import Problem, Variant
from bench.gpu import forms
from bench.gpu.case import GpuCase, l2_bytes
from bench.gpu.clock import Clock, ensure_healthy
from bench.gpu.floors import Floors
from bench.gpu.rows import GRAPH_BELOW_US, device_us
from bench.measure import checked
from bench.timing import Timed, Timing, interleave

GRAPH_US = 300.0  # of work in one graph, at least, in up to MAX_GRAPH_CALLS calls
MAX_GRAPH_CALLS = 48


@dataclass(frozen=True)
class Settings:
    """How long to measure."""

    rounds: int = 5
    min_sample_s: float = 0.002
    budget_s: float = 0.25  # for the samples of one variant, on the stream and again in graphs


Announce = Callable[[str], None]  # told what is about to run, so that a crash can be laid to it


def measure_case(
    case: GpuCase,
    dtype: torch.dtype,
    clock: Clock,
    floors: Floors,
    settings: Settings,
    *,
    left_out: Mapping[str, str] | None = None,
    announce: Announce = lambda name: None,
) -> dict[str, Any]:
    """One case in one dtype.

    Args:
        case: the operator and shape.
        dtype: of its arguments.
        clock: of the device.
        floors: of the device.
        settings: how long to measure.
        left_out: variants that are not run, and why.
        announce: called before each step that runs code under test.
    """
    announce("inputs")
    problem = case.build(dtype, clock.device)
    entries: list[dict[str, Any]] = []
    running: list[tuple[dict[str, Any], Variant]] = []
    for variant in problem.variants:
        announce(variant.name)
        reason = (left_out or {}).get(variant.name)
        entry: dict[str, Any] = {"name": variant.name, "role": variant.role, "note": variant.note}
        entry |= {"status": "left out", "reason": reason} if reason else _checked(problem, variant, clock)
        entries.append(entry)
        if entry["status"] == "measured":
            running.append((entry, variant))
    announce("timing")
    timings = _interleave([_timed(variant) for _, variant in running], clock, settings)
    for (entry, variant), timing in zip(running, timings, strict=True):
        first, third = timing.quartiles_us
        entry |= {"stream_us": timing.median_us, "quartiles_us": [first, third], "samples": len(timing.samples_us)}
        announce(f"{variant.name}: host time and memory")
        with variant.around(), torch.set_grad_enabled(variant.grad):
            variant.call()
            if timing.median_us < GRAPH_BELOW_US:
                entry["host_us"] = clock.host_us(variant.call)
            entry["peak_bytes"] = clock.peak_bytes(variant.call)
    _graphs(running, clock, settings, announce)
    torch.compiler.reset()  # the next shape is compiled for itself
    record: dict[str, Any] = {
        "operator": case.operator,
        "shape": case.label,
        "dtype": str(dtype).removeprefix("torch."),
        "main": case.main,
        "cost": _cost(case, problem, dtype, clock, floors),
        "variants": entries,
    }
    _against_floor(record)
    record["choice"] = _choice(case, dtype, entries)
    return record


def _timed(variant: Variant) -> Timed:
    return Timed(variant.call, variant.grad, variant.around)


def _interleave(timed: list[Timed], clock: Clock, settings: Settings) -> list[Timing]:
    return interleave(
        timed,
        rounds=settings.rounds,
        min_sample_s=settings.min_sample_s,
        budget_s=settings.budget_s,
        sampler=clock.sampler,
        min_rounds=2,
    )


def _checked(problem: Problem, variant: Variant, clock: Clock) -> dict[str, Any]:
    with variant.around():
        found = checked(problem, variant)
        if found["status"] != "measured":
            ensure_healthy(clock.device)
        elif variant.role == "fastmeta":
            found["host_syncs"] = clock.host_syncs(variant.call)
    return found


def _graphs(
    running: list[tuple[dict[str, Any], Variant]], clock: Clock, settings: Settings, announce: Announce
) -> None:
    """The same calls in CUDA graphs: what the device alone takes."""
    captured: list[tuple[dict[str, Any], int, Timed]] = []
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
            captured.append((entry, calls, Timed(replay)))
    announce("timing of graphs")
    for (entry, calls, _), timing in zip(
        captured, _interleave([timed for _, _, timed in captured], clock, settings), strict=True
    ):
        entry["graph_us"] = timing.median_us / calls


def _cost(case: GpuCase, problem: Problem, dtype: torch.dtype, clock: Clock, floors: Floors) -> dict[str, Any]:
    cost = problem.cost
    stream, graph = (floors.floor(case.gemms, cost, dtype, graph=inside) for inside in (False, True))
    spread = cost.bytes if cost.working_set is None else cost.working_set
    return {
        "flops": cost.flops,
        "bytes": cost.bytes,
        "gemm_us": graph.gemm_us,
        "copy_us": graph.copy_us,
        "floor_us": graph.us,
        "floor_stream_us": stream.us,
        "bound": graph.bound,
        "in_l2": spread < l2_bytes(clock.device),
    }


def _against_floor(record: dict[str, Any]) -> None:
    for variant in record["variants"]:
        if "stream_us" in variant:
            variant["stream_times_floor"] = variant["stream_us"] / record["cost"]["floor_stream_us"]
        if (us := device_us(variant)) is not None:
            variant["times_floor"] = us / record["cost"]["floor_us"]


def _choice(case: GpuCase, dtype: torch.dtype, entries: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The choice of fastmeta against its fastest form, by the time on the stream that a user sees."""
    ours = {e["name"]: e["stream_us"] for e in entries if e["role"] == "fastmeta" and "stream_us" in e}
    main = ours.pop(case.main, None)
    if case.shape is None or main is None or not ours:
        return None
    best = min(ours, key=ours.__getitem__)
    name = forms.chosen(case.operator, case.shape, dtype, case.from_head, list(ours))
    return {"chosen": name, "best": best, "best_us": ours[best], "times_best": main / ours[best]}
