"""Runs one case: every variant checked against float64, then timed in turn, then its memory counted."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench.case import Case, Problem, Variant
from bench.memory import peak_bytes
from bench.roofline import Ceilings, Cost
from bench.timing import Timed, Timing, interleave


@dataclass(frozen=True)
class Settings:
    """How long to measure."""

    rounds: int = 9
    min_sample_s: float = 0.005
    budget_s: float = 1.5  # for the samples of one variant


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def checked(problem: Problem, variant: Variant) -> dict[str, Any]:
    """The first call: its error against float64, and why the variant is left out, if it is."""
    if variant.prepare is not None:
        variant.prepare()
    try:
        with torch.set_grad_enabled(variant.grad):
            result = (variant.check or variant.call)()
        error = problem.error(result)
    except Exception as problem_found:  # a peer that cannot do this case must not end the run
        return {"status": "failed", "reason": f"{type(problem_found).__name__}: {problem_found}".splitlines()[0]}
    checked: dict[str, Any] = {"error": error, **(variant.describe(result) if variant.describe else {})}
    if not error <= problem.tolerance:
        return checked | {
            "status": "wrong",
            "reason": f"error {error:.1e} against float64, over {problem.tolerance:.1e}",
        }
    return checked | {"status": "measured"}


def _entry(problem: Problem, variant: Variant, dtype: torch.dtype) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": variant.name, "role": variant.role, "dtype": dtype_name(dtype)}
    if variant.note:
        entry["note"] = variant.note
    if variant.examples is not None:
        entry["extrapolated"] = {"measured_examples": variant.examples, "all_examples": problem.num_examples}
    return entry | {"tolerance": problem.tolerance} | checked(problem, variant)


def _times(entry: dict[str, Any], timing: Timing) -> None:
    factor = 1.0
    if "extrapolated" in entry:
        factor = entry["extrapolated"]["all_examples"] / entry["extrapolated"]["measured_examples"]
    first, third = timing.quartiles_us
    entry["median_us"] = factor * timing.median_us
    entry["quartiles_us"] = [factor * first, factor * third]
    entry["samples"] = len(timing.samples_us)
    entry["calls_per_sample"] = timing.calls
    entry["rejected_samples"] = timing.rejected
    entry["contended_samples"] = timing.contended


def add_floors(case: dict[str, Any], ceilings: Ceilings) -> None:
    """The floor of a measured case in each dtype, and each time as a multiple of it."""
    for dtype, cost in case["cost"].items():
        cost["floor_us"] = ceilings.floor_us(Cost(cost["flops"], cost["bytes"], cost["working_set"]), dtype)
    for variant in case["variants"]:
        if "median_us" in variant:
            variant["times_floor"] = variant["median_us"] / case["cost"][variant["dtype"]]["floor_us"]


def measure_case(case: Case, dtypes: Sequence[torch.dtype], settings: Settings) -> dict[str, Any]:
    """One case: the variants of all its dtypes in one round robin."""
    start = time.monotonic()
    entries: list[dict[str, Any]] = []
    running: list[tuple[dict[str, Any], Variant]] = []
    costs: dict[str, dict[str, float | None]] = {}
    for dtype in dtypes:
        problem = case.build(dtype)
        costs[dtype_name(dtype)] = asdict(problem.cost)
        for variant in problem.variants:
            entries.append(_entry(problem, variant, dtype))
            if entries[-1]["status"] == "measured":
                running.append((entries[-1], variant))
    timings = interleave(
        [Timed(variant.call, variant.grad) for _, variant in running],
        rounds=settings.rounds,
        min_sample_s=settings.min_sample_s,
        budget_s=settings.budget_s,
    )
    for (entry, variant), timing in zip(running, timings, strict=True):
        _times(entry, timing)
        if variant.examples is None:
            with torch.set_grad_enabled(variant.grad):
                entry["peak_bytes"] = peak_bytes(variant.call)
    torch.compiler.reset()  # the next shape is compiled for itself
    return {
        "operator": case.operator,
        "shape": case.label,
        "main": case.main,
        "note": case.note,
        "cost": costs,
        "variants": entries,
        "seconds": time.monotonic() - start,
    }
