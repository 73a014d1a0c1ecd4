"""Time and memory on a device, every variant in turn, so that a slow minute of the machine hits all alike.

On a GPU: by events on the stream, by replays of graphs, by enqueueing alone.
"""

import contextlib
import gc
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.case import Variant

# A sample is contended when the process's runnable threads waited for a core for more than this share of it.
MAX_WAITING = 0.02
HOST_CALLS = 32  # few enough that the launch queue never fills and makes the host wait
HOST_REPEATS = 7


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
    def quartiles_us(self) -> list[float]:
        return self.quantiles_us(4)

    def quantiles_us(self, n: int) -> list[float]:
        """The first and the last of the n-quantiles."""
        if len(self.samples_us) < 2:
            return 2 * self.samples_us
        found = statistics.quantiles(self.samples_us, n=n, method="inclusive")
        return [found[0], found[-1]]

    def counts(self) -> dict[str, int]:
        """For a record."""
        return {
            "samples": len(self.samples_us),
            "calls_per_sample": self.calls,
            "rejected_samples": self.rejected,
            "contended_samples": self.contended,
        }


def waiting_ns() -> int:
    """Time this process's threads have waited for a core so far; 0 where the kernel does not tell."""
    total = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, IndexError, ValueError):  # the thread ended, or no such accounting
            total += int(file.read_text().split()[1])
    return total


def take_sample(variant: Variant, calls: int) -> tuple[float, bool]:
    """Seconds per call, and whether the sample was contended."""
    call = variant.call
    with variant.entered():
        if calls > 1:
            call()  # warms the cache: a training step leaves the data there
        waited = waiting_ns()
        start = time.perf_counter_ns()
        for _ in range(calls):
            call()
        elapsed = time.perf_counter_ns() - start
        return 1e-9 * elapsed / calls, waiting_ns() - waited > MAX_WAITING * elapsed


Sampler = Callable[[Variant, int], tuple[float, bool]]


def interleave(
    variants: Sequence[Variant],
    *,
    rounds: int = 9,
    min_sample_s: float = 0.005,
    budget_s: float = 3.0,
    sampler: Sampler = take_sample,
    min_rounds: int = 3,
) -> list[Timing]:
    """Time each variant in turn, forward in one round and backward in the next.

    Args:
        variants: what is timed; each has run before.
        rounds: samples of each.
        min_sample_s: a sample repeats the call until it is at least this long.
        budget_s: a call whose samples would take longer than this gets fewer.
        sampler: takes one sample; another one on a GPU and in tests.
        min_rounds: samples that even the longest call gets.
    """
    timings, quotas = [], []
    with _no_garbage_collection():
        for one in variants:
            calls, length = _calibrate(one, min_sample_s, sampler)
            timings.append(Timing(calls))
            quotas.append(min(rounds, max(min_rounds, int(budget_s / length))))
        for round_number in range(rounds):
            order = range(len(variants))
            for i in order if round_number % 2 == 0 else reversed(order):
                if len(timings[i].samples_us) < quotas[i]:
                    _take(timings[i], variants[i], quotas[i], sampler)
    return timings


def _calibrate(variant: Variant, min_sample_s: float, sampler: Sampler) -> tuple[int, float]:
    """Calls for a sample of at least ``min_sample_s``, and its length in seconds."""
    calls = 1
    while True:
        per_call, _ = sampler(variant, calls)
        if per_call * calls >= min_sample_s:
            return calls, per_call * calls
        calls = max(2 * calls, math.ceil(min_sample_s / max(per_call, 1e-9)))


def _take(timing: Timing, variant: Variant, retries: int, sampler: Sampler) -> None:
    """One sample, taken again while contended and while the call has retries left."""
    seconds, contended = sampler(variant, timing.calls)
    while contended and timing.rejected < retries:
        timing.rejected += 1
        seconds, contended = sampler(variant, timing.calls)
    timing.contended += contended
    timing.samples_us.append(1e6 * seconds)


class Clock:
    """What the benchmarks need of a device; this one is the CPU, where all time is the call's."""

    device = "cpu"

    def sampler(self, variant: Variant, calls: int) -> tuple[float, bool]:
        """Seconds per call, and whether other processes disturbed them."""
        return take_sample(variant, calls)

    def capture(self, call: Callable[[], Any], calls: int) -> Callable[[], Any] | None:
        """Plays ``calls`` calls back from one graph; None where there are no graphs."""
        return None

    def host_us(self, call: Callable[[], Any]) -> float | None:
        """Microseconds until a call returns, its work under way; None where a call waits for its work."""
        return None

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        """Most bytes allocated at one time during the call, its results included, its arguments not.

        Counted at torch's own allocator: exact and the same in every run, unlike the resident size of the process. What
        a kernel or a BLAS takes from malloc for its tiles is not seen, what fastmeta keeps from call to call is.
        """
        from fastmeta.ops import free_workspace  # a machine with a GPU builds fastmeta first

        free_workspace()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            result = call()  # kept: what is returned counts
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        del result
        held = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        return peak

    def host_syncs(self, call: Callable[[], Any]) -> int | None:
        """How often the call waits for the device."""
        return None

    def kernels(self, call: Callable[[], Any]) -> list[str]:
        """Names of what one call puts on the device, copies and fills included, by torch's profiler."""
        return []


class CudaClock(Clock):
    """The current CUDA device."""

    device = "cuda"

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()

    def sampler(self, variant: Variant, calls: int) -> tuple[float, bool]:
        """Between two events around the calls: where the host is slower than the device, the host's time."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with variant.entered():
            if variant.around is not nullcontext:
                variant.call()  # entering may have made fastmeta forget its plans
            torch.cuda.synchronize()
            start.record()
            for _ in range(calls):
                variant.call()
            end.record()
            end.synchronize()
        return 1e-3 * start.elapsed_time(end) / calls, False

    def capture(self, call: Callable[[], Any], calls: int) -> Callable[[], Any]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(2):  # libraries set themselves up on a stream's first calls
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph would collect garbage, which may free another graph, and empty the cache at every capture.
        with torch.cuda.stream(self._stream), _no_garbage_collection():
            graph.capture_begin()
            try:
                for _ in range(calls):
                    call()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # the capture is invalid: the error above says why
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.synchronize()
        return graph.replay

    def host_us(self, call: Callable[[], Any]) -> float | None:
        taken = []
        for _ in range(HOST_REPEATS):
            torch.cuda.synchronize()
            begin = time.perf_counter_ns()
            for _ in range(HOST_CALLS):
                call()
            taken.append(time.perf_counter_ns() - begin)
        torch.cuda.synchronize()
        return 1e-3 * statistics.median(taken) / HOST_CALLS

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before

    def host_syncs(self, call: Callable[[], Any]) -> int | None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                call()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("called a synchronizing" in str(warning.message) for warning in caught)

    def kernels(self, call: Callable[[], Any]) -> list[str]:
        call()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            call()
            torch.cuda.synchronize()
        return [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def clock_for(device: str) -> Clock:
    return CudaClock() if device == "cuda" else Clock()


class DeviceLost(RuntimeError):
    """The CUDA context is broken: every later call of this process would fail."""


def ensure_healthy(device: str) -> None:
    """Raise :class:`DeviceLost` if an earlier failure has broken the CUDA context."""
    try:
        if float(torch.ones(3, device=device).sum()) != 3.0:
            raise DeviceLost("the device computes nonsense")
    except RuntimeError as error:
        raise DeviceLost(str(error).splitlines()[0]) from error


def reason_of(error: BaseException) -> str:
    """Its type and first line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
