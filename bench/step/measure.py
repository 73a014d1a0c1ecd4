"""Times all steps on one network in turn, then counts the memory and the arithmetic of each."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastmeta
from bench.case import Variant
from bench.clock import Clock, Timing, clock_for, ensure_healthy, interleave, reason_of
from bench.rows import Row
from bench.step import gate
from bench.step.task import Images, Network, Step, on_device, random_batch
from bench.step.variants import EVERY, PLAIN, StepVariant
from fastmeta.derivatives import HOWS, How


@dataclass(frozen=True)
class Settings:
    """How long to measure."""

    rounds: int = 9  # samples of each step
    budget_s: float = 40.0  # for the samples of one step
    warm_up: int = 1  # calls before the one whose arithmetic is counted
    # For a network in all. Half of them may pass until the last step has begun, in the order given; what would begin
    # later is left out.
    seconds: float = math.inf


def measure_network(
    network: Network, variants: Sequence[StepVariant], settings: Settings, clock: Clock | None = None
) -> Row:
    """All rows of one network; a variant that is wrong or cannot run has a reason and no figure."""
    clock = clock or clock_for("cpu")
    begin = time.monotonic()
    errors = gate.errors(network, variants, clock.device)
    batch = random_batch(network, device=clock.device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        on_device(network.make(), clock.device)(batch.weak)
    forward = counter.get_total_flops()
    rows: list[Row] = []
    running: list[tuple[Row, Step]] = []
    for name in [name for name in PLAIN if any(variant.plain == name for variant in variants)]:
        rows.append({"name": name, "schedule": "plain", "status": "measured"})
        running.append((rows[-1], _started(rows[-1], PLAIN[name](network, batch), forward, settings)))
    for variant in variants:
        row = _row(variant, errors)
        rows.append(row)
        if time.monotonic() - begin > settings.seconds / 2:
            row |= {"status": "left out", "reason": "no time was left"}
        elif row["status"] != "wrong":
            try:
                running.append((row, _started(row, variant.make(network, batch), forward, settings)))
            except Exception as error:  # one variant must not end the run
                ensure_healthy(clock.device)
                row |= {"status": "failed", "reason": reason_of(error)}
    timed = [Variant(row["name"], partial(run, step), grad=True) for row, step in running]
    budget = min(settings.budget_s, settings.seconds / 3 / len(timed))
    timings = interleave(timed, rounds=settings.rounds, min_sample_s=0.0, budget_s=budget, sampler=clock.sampler)
    samples: dict[str, list[float]] = {}
    for (row, step), timing in zip(running, timings, strict=True):
        samples[row["name"]] = timing.samples_us
        row |= {"median_us": timing.median_us, "quartiles_us": timing.quartiles_us}
        row |= {"p20_p80_us": timing.quantiles_us(5)} | timing.counts()
        step.optimizer.zero_grad()
        row["peak_bytes"] = clock.peak_bytes(partial(run, step))
        if clock.device == "cuda" and step.method is not None:
            _refine_alone(row, step, clock)
    _add_ratios(rows, samples)
    in_time = time.monotonic() - begin < 0.9 * settings.seconds
    return {
        "network": network.name,
        "device": clock.device,
        "images": {"labeled": network.labeled, "unlabeled": network.unlabeled, "pixels": network.pixels},
        "parameters": sum(p.numel() for p in network.make().parameters()),
        "forward_flops": forward,
        "steps": [*rows, *_amortized(rows)],
        "derivatives": derivatives(network, batch, settings.rounds, clock) if in_time else [],
    }


def _row(variant: StepVariant, errors: dict[str, float]) -> Row:
    row = {key: getattr(variant, key) for key in ("name", "method", "how", "schedule", "plain")}
    row["status"] = "measured"
    if variant.name in errors:
        row |= {"error": errors[variant.name], "same_as": variant.same_as}
        if not row["error"] <= gate.TOLERANCE:
            reason = f"gradients differ by {row['error']:.1e} from {variant.same_as}"
            row |= {"status": "wrong", "reason": reason}
    return row


def run(step: Step) -> Tensor:
    """One step: in float32 on the CPU, on a GPU as users train there."""
    with torch.autocast(step.device, torch.bfloat16, enabled=step.device == "cuda"):
        return step()


def _started(row: Row, step: Step, forward: int, settings: Settings) -> Step:
    """The step after its first calls; counts its arithmetic, in forwards of so many operations.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    for _ in range(settings.warm_up):
        run(step)
    if row["name"].endswith(", graph"):  # what is replayed is not seen, and counting would be captured
        loss = float(run(step))
    else:
        with FlopCounterMode(display=False) as counter:
            loss = float(run(step))
        row["passes"] = counter.get_total_flops() / forward
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}")
    return step


class _Spy:
    """Stands for a method and keeps what it was last given."""

    def __init__(self, method: Any) -> None:
        self.method = method
        self.given: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def refine(self, **given: Any) -> Any:
        self.given = given
        return self.method.refine(**given)


def _refine_alone(row: Row, step: Step, clock: Clock) -> None:
    """The method's part of a step, again and again on what one step gave it."""
    method = step.method
    step.method = spy = _Spy(method)
    run(step)
    step.method = method
    call = partial(method.refine, **spy.given)
    call()
    timed = [Variant("refine", call, grad=True)]
    timing = interleave(timed, rounds=15, budget_s=0.15, sampler=clock.sampler)[0]
    row |= {"refine_us": timing.median_us, "refine_host_syncs": clock.host_syncs(call)}


def _add_ratios(rows: list[Row], samples: dict[str, list[float]]) -> None:
    """Over the plain step: of the same round, so that what slows a round slows both; with the spread of the rounds."""
    plain = {row["name"]: row for row in rows if row["schedule"] == "plain"}
    for row in rows:
        if "median_us" in row and "plain" in row:
            base = plain[row["plain"]]
            pairs = zip(samples[row["name"]], samples[base["name"]], strict=False)
            ratios = Timing(1, [mine / its for mine, its in pairs])
            row |= {"ratio": ratios.median_us, "ratio_quartiles": ratios.quartiles_us}
            row["memory_ratio"] = row["peak_bytes"] / base["peak_bytes"]
            if "passes" in row:
                row["predicted"] = row["passes"] / base["passes"]
            if "refine_us" in row:  # what the method adds at most, where a step's noise hides it
                row["bound"] = 1 + row["refine_us"] / base["median_us"]


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
            if key in update and key in between:
                row[key] = (update[key] + (EVERY - 1) * between[key]) / EVERY
        amortized.append(row)
    return amortized


def derivatives(network: Network, batch: Images, rounds: int, clock: Clock) -> list[Row]:
    """The derivative alone, :func:`fastmeta.label_gradient` in each way, and one forward of the same images.

    In both modes of the model.
    """
    torch.manual_seed(0)
    model = on_device(gate.without_dropout(network.make()), clock.device)
    direction = {name: torch.randn_like(value) / 100 for name, value in model.named_parameters()}
    last = {name: value for name, value in direction.items() if name.startswith("fc.")}

    def gradient(how: How) -> Tensor:
        moving = last if how == "last_layer" else direction
        return fastmeta.label_gradient(model, batch.weak, moving, loss="mse_probs", how=how)

    rows: list[Row] = []
    for mode in ("train", "eval"):
        model.train(mode == "train")
        exact = gradient("double_backward")
        forward = torch.no_grad()(partial(model, batch.weak))
        timed = [Variant("forward", forward), *(Variant(how, partial(gradient, how)) for how in HOWS)]
        timings = interleave(timed, rounds=rounds, min_sample_s=0.0, budget_s=60.0, sampler=clock.sampler)
        for one, timing in zip(timed, timings, strict=True):
            row: Row = {"name": one.name, "mode": mode, "median_us": timing.median_us}
            row["ratio"] = timing.median_us / timings[0].median_us
            row["peak_bytes"] = clock.peak_bytes(one.call)
            row |= timing.counts()
            if one.name not in ("forward", "last_layer"):
                row["difference"] = gate.relative_error(one.call(), exact)
            rows.append(row)
    return rows
