"""Time and memory on a device. On a GPU: by events on the stream, by replays of graphs, by enqueueing alone."""

import contextlib
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.timing import Timed, take_sample

HOST_CALLS = 32  # few enough that the launch queue never fills and makes the host wait
HOST_REPEATS = 7


class Clock:
    """What the benchmarks need of a device; this one is the CPU, where all time is the call's."""

    device = "cpu"

    def sampler(self, timed: Timed, calls: int) -> tuple[float, bool]:
        """Seconds per call, and whether other processes disturbed them."""
        return take_sample(timed, calls)

    def capture(self, call: Callable[[], Any], calls: int) -> Callable[[], Any] | None:
        """Plays ``calls`` calls back from one graph; None where there are no graphs."""
        return None

    def host_us(self, call: Callable[[], Any]) -> float | None:
        """Microseconds until a call returns, its work under way; None where a call waits for its work."""
        return None

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        """Most bytes allocated at one time during the call, its results included."""
        from bench.memory import peak_bytes  # needs fastmeta, which a machine with a GPU builds first

        return peak_bytes(call)

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

    def sampler(self, timed: Timed, calls: int) -> tuple[float, bool]:
        """Between two events around the calls: where the host is slower than the device, the host's time."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with timed.around(), torch.set_grad_enabled(timed.grad):
            if timed.around is not nullcontext:
                timed.call()  # entering may have made fastmeta forget its plans
            torch.cuda.synchronize()
            start.record()
            for _ in range(calls):
                timed.call()
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
        # torch.cuda.graph would collect garbage and empty the cache at every capture.
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
    """A capture must not free another graph in its middle."""
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
    """Raise unless the device still computes; what failed before may have broken its context."""
    try:
        if float(torch.ones(3, device=device).sum()) != 3.0:
            raise DeviceLost("the device computes nonsense")
    except RuntimeError as error:
        raise DeviceLost(str(error).splitlines()[0]) from error
