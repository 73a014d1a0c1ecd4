"""Which implementation of each operator this installation has, and why the others are missing."""

import sys

import torch

from fastmeta import _extension, ops
from fastmeta.dispatch import IMPLEMENTATIONS, Operator


def availability() -> dict[str, dict[str, bool]]:
    """For each public operator, whether each implementation is there.

    >>> availability()["label_gradient"]["reference"]
    True
    """
    found = {}
    for name in ops.__all__:
        module = sys.modules[getattr(ops, name).__module__]
        kernels = [value for value in vars(module).values() if isinstance(value, Operator)]
        if kernels:
            found[name] = {
                implementation: all(implementation in kernel.implementations() for kernel in kernels)
                for implementation in IMPLEMENTATIONS
            }
    return found


def reasons() -> dict[str, str]:
    """Why an implementation is missing from some operator; names of those that are complete are absent."""
    missing = {
        implementation
        for available in availability().values()
        for implementation, is_there in available.items()
        if not is_there
    }
    known = {
        "cpp": _extension.REASON or "these operators have no C++ kernel",
        "cuda": "this version of fastmeta has no CUDA kernels",
        "triton": "this version of fastmeta has no Triton kernels",
    }
    return {implementation: known[implementation] for implementation in IMPLEMENTATIONS if implementation in missing}


def doctor() -> str:
    """A report for a person."""
    found = availability()
    width = max(map(len, found))
    lines = [f"{'operator'.ljust(width)}  " + "  ".join(IMPLEMENTATIONS)]
    for name, available in found.items():
        marks = [("yes" if available[choice] else "-").ljust(len(choice)) for choice in IMPLEMENTATIONS]
        lines.append(f"{name.ljust(width)}  " + "  ".join(marks).rstrip())
    lines.append("")
    lines.extend(f"no {implementation}: {reason}" for implementation, reason in reasons().items())
    devices = f"{torch.get_num_threads()} CPU threads"
    if torch.cuda.is_available():
        devices += f", {torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    lines.append(f"torch {torch.__version__}, {devices}")
    info = _extension.build_info()
    if info is not None:
        lines.append("extension: " + ", ".join(f"{key} {value}" for key, value in info.items()))
    return "\n".join(lines)
