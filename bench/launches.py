"""How many kernels a call launches, by torch's profiler: after all timing, which it would disturb."""

import time
from typing import TYPE_CHECKING

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.case import Variant
from bench.progress import Progress

if TYPE_CHECKING:
    from bench.operators import Chosen


def kernels_of(variant: Variant) -> list[str]:
    """Names of what one call puts on the device, copies and fills included."""
    with variant.around(), torch.set_grad_enabled(variant.grad):
        variant.call()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            variant.call()
            torch.cuda.synchronize()
    return [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]


def count_all(cases: "Chosen", progress: Progress, deadline: float) -> None:
    """Add ``launches`` and ``kernels`` to fastmeta's and the eager variants at every size, until the deadline."""
    records = {record["key"]: record for record in progress.cases}
    for case, dtype in ((case, dtype) for case, dtypes in cases for dtype in dtypes):
        record = records.get(case.key(dtype), {})
        measured = {entry["name"]: entry for entry in record.get("variants", []) if "stream_us" in entry}
        if not measured:
            continue
        try:
            for variant in case.build(dtype, "cuda").variants:
                if time.monotonic() > deadline:
                    return
                if variant.role in ("fastmeta", "eager") and variant.name in measured:
                    kernels = kernels_of(variant)
                    measured[variant.name] |= {"launches": len(kernels), "kernels": kernels}
        except Exception as error:  # no profiler on this machine: the column stays empty
            print(f"Launches are not counted: {type(error).__name__}: {error}".splitlines()[0], flush=True)
            return
        finally:
            progress.save()
