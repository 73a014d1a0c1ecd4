"""What a call costs the host: on a GPU without the driver's launch, and on the CPU where the call is all there is.

On a GPU that is not there (bench/fake_driver.py), whose launches and products return at once. The split of a call:

  arguments   tensors and numbers unpacked, all that DLPack does not show asked for, the plan found
  results     the results allocated, and scratch memory
  launches    kernels and products enqueued; on the CPU the native function
  Python      the public function around all that
"""

import argparse
import json
import sys
import timeit
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmeta import _extension, ops
from fastmeta.dispatch import OPERATORS
from fastmeta.losses import LOSSES

REPEATS, CALLS = 60, 200
PLANNED, TINY = (448, 128, 100), (256, 128, 10)
GOALS = {1: 4.0, 2: 6.0}  # microseconds by number of launches
_C: Any = _extension._C
_empty: Any = torch._C._dynamo.guards._empty_strided_cpu  # type: ignore[attr-defined]

Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, help="write the figures here")


def run(options: argparse.Namespace) -> int:
    from bench import fake_driver

    fake_driver.activate()
    four = torch.rand(4)
    alone = microseconds(lambda: torch.add(four, four))
    with_triton = [name for name, each in OPERATORS.items() if each.triton]
    rows = [planned(name, dtype) for name in with_triton for dtype in (torch.bfloat16, torch.float32)]
    tiny = [row for name, each in OPERATORS.items() if each.numbers and (row := on_cpu(name)) is not None]
    print(f"torch.add of four numbers: {alone:.2f} us\n")
    print(f"on a GPU, without the driver's launch, at {PLANNED}, us\n{table(rows)}\n")
    print(f"on the CPU, at {TINY}, us\n{table(tiny)}")
    if options.json:
        options.json.write_text(json.dumps({"add_us": alone, "gpu": rows, "cpu": tiny}, indent=1) + "\n")
    return 0


def microseconds(call: Callable[[], Any]) -> float:
    """The fastest of many runs: whatever else the machine does makes a run slower, never faster."""
    call()
    return min(timeit.repeat(call, number=CALLS, repeat=REPEATS)) / CALLS * 1e6


def calls(name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Callable[[], Any], tuple[Any, ...]]:
    """The public call of an operator, and the arguments of its schema."""
    n, d, c = shape
    h, f, y, v, b, w = (torch.rand(*size).to(dtype) for size in ((n, d), (n, c), (n, c), (c, d), (c,), (n,)))
    loss, epsilon = LOSSES["cross_entropy"], torch.tensor(0.1)
    if name == "last_layer_gradient":
        return lambda: ops.last_layer_gradient(h, f, y, w), (h, f, None, None, y, w, loss)
    if name == "per_example_dot":
        return lambda: ops.per_example_dot(h, f, y, v, b), (h, f, None, None, y, v, b, loss)
    if name == "label_gradient":
        return lambda: ops.label_gradient(h, f, v, b), (h, f, None, None, None, v, b, loss, 1.0)
    if name == "hessian_vector_product":
        return lambda: ops.hessian_vector_product(h, f, v, b, w), (h, f, None, v, b, w, loss, 0.0)
    if name == "feature_similarity":
        return lambda: ops.feature_similarity(h, h, y), (h, h, y, 1.0, True)
    if name == "finite_difference_labels":
        call = lambda: ops.finite_difference_labels(f, f, y, epsilon, step=0.1)  # noqa: E731
        return call, (f, f, y, epsilon, 0.1, True)
    m = 1_280_000
    table, average, square, steps = torch.ones(m), torch.zeros(m), torch.zeros(m), torch.zeros(m, dtype=torch.int32)
    index, grad = torch.randperm(m)[:768], torch.randn(768)
    tensors = table, index, grad, average, square, steps
    return lambda: ops.masked_adam_(*tensors, lr=1e-3), (*tensors, 1e-3, 0.9, 0.999, 1e-8, None, None)


def planned(name: str, dtype: torch.dtype) -> Row:
    """An operator whose plans, compiled for a GPU, run on tensors of the CPU: their memory is not touched."""
    from bench import fake_driver

    call, arguments = calls(name, PLANNED, dtype)
    dispatcher = OPERATORS[name]
    before = dispatcher.entry
    dispatcher.entry = _C.Entry(name, "cpu")
    try:
        dispatcher.planned(dispatcher.entry)(*arguments)  # plans, and keeps the plan
        launches, products = fake_driver.launched().number, fake_driver.products()
        call()
        launches, products = fake_driver.launched().number - launches, fake_driver.products() - products
        plan = dispatcher.entry.find(*arguments)
        assert isinstance(plan, _C.Program), f"{name} has no compiled program"
        row = {"name": name, "dtype": str(dtype).removeprefix("torch."), "launches": launches, "products": products}
        return row | split(call, arguments, dispatcher.entry, plan.allocations)
    finally:
        dispatcher.entry = before


def on_cpu(name: str) -> Row | None:
    """An operator's native function on the CPU; None if it has none, or if it leaves this call to torch."""
    call, arguments = calls(name, TINY, torch.float32)
    entry = OPERATORS[name].entry
    result = entry(*arguments)
    if result is NotImplemented:
        return None
    results = [] if result is None else [result] if isinstance(result, Tensor) else [t for t in result if t is not None]
    allocations = [(tuple(t.shape), t.stride(), t.dtype) for t in results]
    return {"name": name, "dtype": "float32", "launches": 0, "products": 0} | split(call, arguments, entry, allocations)


def split(call: Callable[[], Any], arguments: tuple[Any, ...], entry: Any, allocations: Any) -> Row:
    """The whole call and its parts, in microseconds."""
    loop = microseconds(lambda: None)
    elsewhere = _C.Entry(entry.name, "cpu")  # has a plan, of another layout
    elsewhere.keep(*(a[:1] if isinstance(a, Tensor) and a.dim() else a for a in arguments), "native")
    assert elsewhere(*arguments) is NotImplemented
    assert len(elsewhere) == 1
    inside = microseconds(lambda: entry(*arguments))
    found = microseconds(lambda: elsewhere(*arguments))
    results = sum(microseconds(partial(_empty, *of)) for of in allocations)
    whole = microseconds(call)
    return {
        "whole": whole - loop,
        "arguments": found - loop,
        "results": results,
        "launches_us": inside - found - results,
        "python": whole - inside,
    }


def table(rows: list[Row]) -> str:
    head = f"{'':26s}{'':10s}{'launches':>9s}{'products':>9s}{'whole':>8s}{'goal':>6s}"
    head += f"{'arguments':>11s}{'results':>9s}{'launches':>10s}{'Python':>8s}"
    lines = [head]
    for row in rows:
        goal = GOALS.get(row["launches"] + row["products"])
        lines.append(
            f"{row['name']:26s}{row['dtype']:10s}{row['launches']:9d}{row['products']:9d}{row['whole']:8.2f}"
            f"{'' if goal is None else f'{goal:.0f}':>6s}{row['arguments']:11.2f}{row['results']:9.2f}"
            f"{row['launches_us']:10.2f}{row['python']:8.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__)
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))
