"""Times all steps on one network in turn, then counts the memory and the arithmetic of each."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.memory import peak_bytes
from bench.step import derivatives, gate
from bench.step.task import Batch, Network, Step, random_batch
from bench.step.variants import EVERY, PLAIN, Variant
from bench.timing import Timed, Timing, interleave

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How long to measure, and on how many images."""

    rounds: int = 9
    budget_s: float = 40.0  # for the samples of one variant
    batch: int = 16


def measure_network(network: Network, variants: Sequence[Variant], settings: Settings) -> Row:
    """All rows of one network; a variant that is wrong or cannot run has a reason and no figure."""
    errors = gate.errors(network, variants)
    batch = random_batch(settings.batch, network.pixels)
    forward = _forward_flops(network, batch)
    rows: list[Row] = []
    running: list[tuple[Row, Step]] = []
    for name in [name for name in PLAIN if any(variant.plain == name for variant in variants)]:
        rows.append({"name": name, "schedule": "plain", "status": "measured"})
        running.append((rows[-1], _started(rows[-1], PLAIN[name](network, batch), forward)))
    for variant in variants:
        row = _row(variant, errors)
        rows.append(row)
        if row["status"] != "wrong":
            try:
                running.append((row, _started(row, variant.make(network, batch), forward)))
            except Exception as error:  # one variant must not end the run
                row |= {"status": "failed", "reason": f"{type(error).__name__}: {error}".splitlines()[0]}
    timed = [Timed(step, grad=True) for _, step in running]
    timings = interleave(timed, rounds=settings.rounds, min_sample_s=0.0, budget_s=settings.budget_s)
    for (row, step), timing in zip(running, timings, strict=True):
        _times(row, timing)
        step.optimizer.zero_grad()
        row["peak_bytes"] = peak_bytes(step)
    _add_ratios(rows)
    amortized = _amortized(rows)
    return {
        "network": network.name,
        "parameters": sum(p.numel() for p in network.make().parameters()),
        "forward_flops": forward,
        "steps": rows + amortized,
        "derivatives": derivatives.measure(network, batch, settings.rounds),
    }


def _row(variant: Variant, errors: dict[str, float]) -> Row:
    row: Row = {
        "name": variant.name,
        "method": variant.method,
        "how": variant.how,
        "schedule": variant.schedule,
        "plain": variant.plain,
        "status": "measured",
    }
    if variant.name in errors:
        row |= {"error": errors[variant.name], "same_as": variant.same_as}
        if not row["error"] <= gate.TOLERANCE:
            reason = f"gradients differ by {row['error']:.1e} from {variant.same_as}"
            row |= {"status": "wrong", "reason": reason}
    return row


def _started(row: Row, step: Step, forward: int) -> Step:
    """The step after its first calls; counts its arithmetic, in forwards of so many operations.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    step()
    with FlopCounterMode(display=False) as counter:
        loss = float(step())
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}")
    row["passes"] = counter.get_total_flops() / forward
    return step


def _forward_flops(network: Network, batch: Batch) -> int:
    model = network.make()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(batch.weak)
    return counter.get_total_flops()


def _times(row: Row, timing: Timing) -> None:
    row["median_us"] = timing.median_us
    row["quartiles_us"] = list(timing.quartiles_us)
    row["samples"] = len(timing.samples_us)
    row["rejected_samples"] = timing.rejected
    row["contended_samples"] = timing.contended


def _add_ratios(rows: list[Row]) -> None:
    plain = {row["name"]: row for row in rows if row["schedule"] == "plain"}
    for row in rows:
        if "median_us" in row and "plain" in row:
            base = plain[row["plain"]]
            row["ratio"] = row["median_us"] / base["median_us"]
            row["predicted"] = row["passes"] / base["passes"]
            row["memory_ratio"] = row["peak_bytes"] / base["peak_bytes"]


def _amortized(rows: list[Row]) -> list[Row]:
    """The example weights with an update in every :data:`EVERY` steps, computed from the two kinds of steps."""
    found = {row["name"]: row for row in rows if "ratio" in row}
    between = found.get("ExampleWeights, between updates, last_layer, fused")
    amortized = []
    for schedule in ("fused", "alternating"):
        update = found.get(f"ExampleWeights, last_layer, {schedule}")
        if between is None or update is None:
            continue
        row = {key: update[key] for key in ("how", "schedule", "plain")}
        row |= {"method": f"ExampleWeights, every {EVERY} steps", "status": "computed"}
        row["name"] = f"{row['method']}, last_layer, {schedule}"
        for key in ("median_us", "ratio", "passes", "predicted"):
            row[key] = (update[key] + (EVERY - 1) * between[key]) / EVERY
        amortized.append(row)
    return amortized
