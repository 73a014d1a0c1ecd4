"""The derivative alone: :func:`fastmeta.label_gradient` in each way against one forward of the same images."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastmeta
from bench.clock import Clock
from bench.step.gate import relative_error, without_dropout
from bench.step.task import Batch, Network, on_device
from bench.timing import Timed, interleave
from fastmeta.derivatives import HOWS, How

MODES = ("train", "eval")


def measure(network: Network, batch: Batch, rounds: int, clock: Clock) -> list[dict[str, Any]]:
    """One row for the forward and one for each way, in both modes of the model."""
    torch.manual_seed(0)
    model = on_device(without_dropout(network.make()), clock.device)
    direction = {name: torch.randn_like(value) / 100 for name, value in model.named_parameters()}
    last = {name: value for name, value in direction.items() if name.startswith("fc.")}
    rows = []
    for mode in MODES:
        model.train(mode == "train")

        def forward() -> Tensor:
            with torch.no_grad():
                return model(batch.weak)

        def gradient(how: How) -> Tensor:
            moving = last if how == "last_layer" else direction
            return fastmeta.label_gradient(model, batch.weak, moving, loss="mse_probs", how=how)

        exact = gradient("double_backward")
        calls: dict[str, Callable[[], Tensor]] = {"forward": forward, **{how: partial(gradient, how) for how in HOWS}}
        timed = [Timed(call) for call in calls.values()]
        timings = interleave(timed, rounds=rounds, min_sample_s=0.0, budget_s=60.0, sampler=clock.sampler)
        for (name, call), timing in zip(calls.items(), timings, strict=True):
            row: dict[str, Any] = {
                "name": name,
                "mode": mode,
                "median_us": timing.median_us,
                "ratio": timing.median_us / timings[0].median_us,
                "peak_bytes": clock.peak_bytes(call),
                "samples": len(timing.samples_us),
                "contended_samples": timing.contended,
            }
            if name not in ("forward", "last_layer"):
                row["difference"] = relative_error(call(), exact)
            rows.append(row)
    return rows
