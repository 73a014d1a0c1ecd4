"""What a call costs the host, without the driver's launch: ``fastmeta.ops`` down to Triton's launcher, in C.

On a GPU that is not there (``bench/fake_driver.py``), at the first benchmark shape, where a call is all host.
"""

import json
import timeit
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from bench import fake_driver
from fastmeta import _entry, _kernels
from fastmeta.dispatch import Operator

SHAPE = (256, 128, 10)


def register_on_cpu() -> None:
    """Have ``impl="triton"`` of every operator take CPU tensors: their memory is not touched."""
    for name in _kernels.TRITON:
        operator(name)._kernels["cpu", "triton"] = _kernels.triton(name, _entry.entry(name, "cpu"))


def operator(name: str) -> Operator:
    """The public operator's dispatcher."""
    return import_module(f"fastmeta.ops.{_kernels.TRITON[name]}").OPERATOR


def microseconds() -> dict[str, float]:
    """The fastest of many runs of each operator."""
    from fastmeta import ops

    n, d, c = SHAPE
    h, f, y, v, b = torch.rand(n, d), torch.rand(n, c), torch.rand(n, c), torch.rand(c, d), torch.rand(c)
    w, epsilon = torch.rand(n), torch.tensor(0.1)
    given: dict[str, tuple[tuple[Tensor, ...], dict[str, float]]] = {
        "last_layer_gradient": ((h, f, y, w), {}),
        "per_example_dot": ((h, f, y, v, b), {}),
        "label_gradient": ((h, f, v, b), {}),
        "hessian_vector_product": ((h, f, v, b, w), {}),
        "feature_similarity": ((h, h, y), {}),
        "finite_difference_labels": ((f, f, y, epsilon), {"step": 0.1}),
    }
    found = {}
    for name, (tensors, options) in given.items():
        call = getattr(ops, name)

        def once(call: Any = call, tensors: Any = tensors, options: Any = options) -> None:
            call(*tensors, impl="triton", **options)

        once()
        found[name] = min(timeit.repeat(once, number=200, repeat=60)) / 200 * 1e6
    return found


if __name__ == "__main__":
    fake_driver.activate()
    register_on_cpu()
    print(json.dumps(microseconds()))
