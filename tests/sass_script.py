"""Run by test_triton_sass.py without Triton's interpreter: the row kernels' machine code for sm_90, and what is in it.

Prints one JSON object for each kernel: registers of a thread, and of each loop its barriers, shuffles and loads.
"""

import json
import re
import subprocess
import tempfile
from importlib import import_module
from typing import Any

import torch
import triton

from bench.compiled import compiled, usage, work
from fastmeta.dispatch import OPERATORS
from fastmeta.losses import LOSSES
from fastmeta.triton_kernels._program import recording

ARCHITECTURE = 90
_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);")
_BRANCH = re.compile(r"BRA\S*\s+.*?(0x[0-9a-f]+)")


def loops(sass: str) -> list[dict[str, int]]:
    """What lies between a branch back and where it goes; the branch to itself behind the end is left out."""
    code = [(int(found[1], 16), found[2]) for found in map(_INSTRUCTION.match, sass.splitlines()) if found]
    found = []
    for place, text in code:
        branch = _BRANCH.search(text)
        if branch and int(branch[1], 16) < place:
            body = [one for at, one in code if int(branch[1], 16) <= at <= place]
            counts = {name: sum(name in one for one in body) for name in ("BAR", "SHFL", "LDG", "STG")}
            found.append(counts | {"instructions": len(body)})
    return found


def main() -> None:
    for name in ("per_example_dot", "label_gradient", "last_layer_gradient", "hessian_vector_product"):
        for loss in ("cross_entropy", "mse_probs"):
            for classes in (1000, 9000):
                for dtype in (torch.bfloat16, torch.float32):
                    report(name, loss, classes, dtype)
    report("finite_difference_labels", "", 9000, torch.bfloat16)


def arguments(name: str, classes: int, dtype: torch.dtype, loss: int) -> tuple[Any, ...]:
    """Of the registered schema, without memory."""

    def tensor(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    h, f, v, b, w = tensor(4096, 64), tensor(4096, classes), tensor(classes, 64), tensor(classes), tensor(4096)
    return {
        "per_example_dot": (h, f, None, None, f, v, b, loss),
        "label_gradient": (h, f, None, None, f, v, b, loss, 0.5),
        "last_layer_gradient": (h, f, None, None, f, w, loss),
        "hessian_vector_product": (h, f, f, v, b, w, loss, 0.5),
        "finite_difference_labels": (f, f, f, tensor(), 0.5, True),
    }[name]


def report(name: str, loss: str, classes: int, dtype: torch.dtype) -> None:
    given = arguments(name, classes, dtype, LOSSES.get(loss, 0))
    program = import_module(f"fastmeta.triton_kernels.{OPERATORS[name].triton}").plan(*given)
    count = next(place for place, one in enumerate(given) if isinstance(one, int | float))
    with recording() as launches:
        program.run(given[:count], given[count:])
    (launch,) = (one for one in launches if one.kernel.fn.__name__ in ("rows", "label_step"))
    job = work(launch, ARCHITECTURE)
    made = compiled(job)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", file.name]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = usage(made.asm["cubin"])
    row = {"kernel": f"{name} {loss} {classes} {dtype}", "classes": classes, "registers": registers, "stack": stack}
    print(json.dumps(row | {"loops": loops(sass)}), flush=True)


if __name__ == "__main__":
    main()
