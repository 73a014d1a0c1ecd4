"""Peak memory of one call."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

from fastmeta.ops import free_workspace


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes allocated at one time during the call, its results included, its arguments not.

    Counted at torch's own allocator: exact and the same in every run, unlike the resident size of the process. What
    a kernel or a BLAS takes from malloc for its tiles is not seen, what fastmeta keeps from call to call is.
    """
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
