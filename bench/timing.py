"""Interleaved timing: every variant in turn, round after round, so that a slow minute of the machine hits all alike."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

# A sample is contended when the process's runnable threads waited for a core for more than this share of it.
MAX_WAITING = 0.02
MIN_ROUNDS = 3


@dataclass(frozen=True)
class Timed:
    """A call to time, which has run before, whether autograd records it, and what its samples are taken in."""

    call: Callable[[], object]
    grad: bool = False
    around: Callable[[], AbstractContextManager[object]] = nullcontext


@dataclass
class Timing:
    """Samples of one variant, in microseconds per call."""

    calls: int  # calls in one sample
    samples_us: list[float] = field(default_factory=list)
    rejected: int = 0  # samples thrown away because other processes ran
    contended: int = 0  # samples kept although they did: the retries were used up

    @property
    def median_us(self) -> float:
        return statistics.median(self.samples_us)

    @property
    def quartiles_us(self) -> tuple[float, float]:
        if len(self.samples_us) < 2:
            return self.samples_us[0], self.samples_us[0]
        first, _, third = statistics.quantiles(self.samples_us, n=4, method="inclusive")
        return first, third


def waiting_ns() -> int:
    """Time this process's threads have waited for a core so far; 0 where the kernel does not tell."""
    total = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(file.read_text().split()[1])
        except (OSError, IndexError, ValueError):  # the thread ended, or no such accounting
            continue
    return total


def take_sample(timed: Timed, calls: int) -> tuple[float, bool]:
    """Seconds per call, and whether the sample was contended."""
    call = timed.call
    with timed.around(), torch.set_grad_enabled(timed.grad):
        if calls > 1:
            call()  # brings the variant's data back into cache, where its calls find it in use
        waited = waiting_ns()
        start = time.perf_counter_ns()
        for _ in range(calls):
            call()
        elapsed = time.perf_counter_ns() - start
        return 1e-9 * elapsed / calls, waiting_ns() - waited > MAX_WAITING * elapsed


Sampler = Callable[[Timed, int], tuple[float, bool]]


def _calibrate(timed: Timed, min_sample_s: float, sampler: Sampler) -> tuple[int, float]:
    """Calls for a sample of at least ``min_sample_s``, and its length in seconds."""
    calls = 1
    while True:
        per_call, _ = sampler(timed, calls)
        if per_call * calls >= min_sample_s:
            return calls, per_call * calls
        calls = max(2 * calls, math.ceil(min_sample_s / max(per_call, 1e-9)))


def interleave(
    timed: Sequence[Timed],
    *,
    rounds: int = 9,
    min_sample_s: float = 0.005,
    budget_s: float = 3.0,
    sampler: Sampler = take_sample,
    min_rounds: int = MIN_ROUNDS,
) -> list[Timing]:
    """Time each call in turn, forward in one round and backward in the next.

    Args:
        timed: what is timed.
        rounds: samples of each.
        min_sample_s: a sample repeats the call until it is at least this long.
        budget_s: a call whose samples would take longer than this gets fewer.
        sampler: takes one sample; another one on a GPU and in tests.
        min_rounds: samples that even the longest call gets.
    """
    timings, quotas = [], []
    collecting = gc.isenabled()
    gc.disable()
    try:
        for one in timed:
            calls, length = _calibrate(one, min_sample_s, sampler)
            timings.append(Timing(calls))
            quotas.append(min(rounds, max(min_rounds, int(budget_s / length))))
        for round_number in range(rounds):
            order = range(len(timed))
            for i in order if round_number % 2 == 0 else reversed(order):
                if len(timings[i].samples_us) < quotas[i]:
                    _take(timings[i], timed[i], quotas[i], sampler)
    finally:
        if collecting:
            gc.enable()
    return timings


def _take(timing: Timing, timed: Timed, retries: int, sampler: Sampler) -> None:
    """One sample, taken again while contended and while the call has retries left."""
    seconds, contended = sampler(timed, timing.calls)
    while contended and timing.rejected < retries:
        timing.rejected += 1
        seconds, contended = sampler(timed, timing.calls)
    timing.contended += contended
    timing.samples_us.append(1e6 * seconds)
