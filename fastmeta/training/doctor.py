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
        if kernels:  # solve_hessian has none of its own: it is made of the others
            found[name] = {
                implementation: all(implementation in kernel.implementations() for kernel in kernels)
                for implementation in IMPLEMENTATIONS
            }
    return found


def reasons() -> list[str]:
    """Why an implementation is missing, one line for each that some operator lacks."""
    known = {
        "cpp": _extension.REASON,
        "cuda": _extension.CUDA_REASON or "feature_similarity and finite_difference_labels are Triton's",
        "triton": _extension.TRITON_REASON or "lists of tensors and tables are CUDA C++",
    }
    found = availability()
    lines = []
    for implementation in IMPLEMENTATIONS:
        missing = [name for name, available in found.items() if not available[implementation]]
        if missing:
            names = "every operator" if len(missing) == len(found) else ", ".join(missing)
            lines.append(f"no {implementation} for {names}: {known[implementation]}")
    return lines


def doctor() -> str:
    """A report for a person."""
    found = availability()
    width = max(map(len, found))
    lines = [f"{'operator'.ljust(width)}  " + "  ".join(IMPLEMENTATIONS)]
    for name, available in found.items():
        marks = [("yes" if available[choice] else "-").ljust(len(choice)) for choice in IMPLEMENTATIONS]
        lines.append(f"{name.ljust(width)}  " + "  ".join(marks).rstrip())
    lines.append("")
    lines.append("solve_hessian: made of hessian_vector_product and torch's linear algebra")
    lines.extend(reasons())
    devices = f"{torch.get_num_threads()} CPU threads"
    if torch.cuda.is_available():
        devices += f", {torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    lines.append(f"torch {torch.__version__}, {devices}")
    info = _extension.build_info()
    if info is not None:
        lines.append(
            "extension: " + ", ".join(f"{key.replace('_', ' ')} {_words(value)}" for key, value in info.items())
        )
    return "\n".join(lines)


def _words(value: object) -> str:
    """A list as its items, those that are rows of a table by their names."""
    if not isinstance(value, list):
        return str(value)
    return " ".join(item[0] if isinstance(item, tuple) else str(item) for item in value) or "-"
