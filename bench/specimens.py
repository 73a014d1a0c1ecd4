"""Calls of the Triton operators that between them make every launch that can be made, on tensors without memory."""

import contextlib
import math
from collections.abc import Callable, Iterator
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmeta import _kernels
from fastmeta.losses import LOSSES
from fastmeta.triton_kernels import _forms, _tuning
from fastmeta.triton_kernels._launch import Recorded, recording

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CLASSES = (10, 20, 50, 100, 200, 400, 1000, 2000, 4000, 8000, 30522)
LONG = (8192, 2048, 30522)
# The losses with the most to hold; the rest have parts of their row functions.
HEAVY = ("mse_probs", "cross_entropy")


class Variant(NamedTuple):
    """What a call has beside its shape."""

    loss: str = HEAVY[0]
    head: bool = False
    extras: bool = True  # biases, weights, damping, projection
    classes: bool = False
    aligned: bool = True


class Found(NamedTuple):
    """A launch, by whom, and in which arithmetic."""

    operator: str
    arithmetic: str
    launch: Recorded


def _tensor(shape: tuple[int, ...], dtype: torch.dtype, aligned: bool) -> Tensor:
    """Without memory; at an odd address, with an odd row stride, if it is not aligned."""
    if aligned or not shape:
        return torch.empty(shape, dtype=dtype, device="meta")
    columns = shape[-1] + (1 - shape[-1] % 2)
    strides = (columns, 1) if len(shape) == 2 else (1,)
    return torch.empty(math.prod(shape[:-1]) * columns + 1, dtype=dtype, device="meta").as_strided(shape, strides, 1)


def arguments(
    operator: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    variant: Variant,
    make: Callable[..., Tensor] = _tensor,
) -> tuple[Any, ...]:
    """The arguments of the registered schema (csrc/operators.cpp)."""
    n, d, c = shape

    def tensor(*size: int, of: torch.dtype = dtype) -> Tensor:
        return make(size, of, variant.aligned)

    loss = LOSSES[variant.loss]
    if operator == "feature_similarity":
        return tensor(n, d), tensor(n, d), tensor(n, c), 0.5, variant.extras
    if operator == "finite_difference_labels":
        return tensor(n, c), tensor(n, c), tensor(n, c), tensor(of=torch.float32), 0.5, variant.extras
    bias = tensor(c) if variant.extras else None
    weights = tensor(n) if variant.extras else None
    outputs = (None, tensor(c, d), bias) if variant.head else (tensor(n, c), None, None)
    targets = tensor(n, of=torch.int64) if variant.classes else tensor(n, c)
    if operator == "last_layer_gradient":
        return tensor(n, d), *outputs, targets, weights, loss
    if operator == "per_example_dot":
        return tensor(n, d), *outputs, targets, tensor(c, d), bias, loss
    if operator == "label_gradient":
        return tensor(n, d), *outputs, tensor(c, d), bias, loss, 0.5
    return tensor(n, d), tensor(n, c), tensor(c, d), bias, weights, loss, 0.1


def function(operator: str) -> Callable[..., Any]:
    """The Triton implementation."""
    return getattr(import_module(f"fastmeta.triton_kernels.{_kernels.TRITON[operator]}"), operator)


@contextlib.contextmanager
def _arithmetic(name: str) -> Iterator[None]:
    """TF32 for float32 products, or not."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32" if name == "tf32" else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _variants(operator: str, quick: bool) -> list[Variant]:
    """Those whose launches differ."""
    if operator in ("feature_similarity", "finite_difference_labels"):
        found = [Variant(), Variant(extras=False), Variant(aligned=False)]
        return found[:1] if quick else found
    heads = [False] if operator == "hessian_vector_product" else [False, True]
    found = [Variant(loss, head) for loss in HEAVY[: 1 if quick else 2] for head in heads]
    if not quick:
        found += [Variant(loss, heads[-1], aligned=False) for loss in LOSSES]
        found += [Variant(loss, extras=False, classes=True) for loss in LOSSES]
    return found


def _shapes(form: str) -> list[tuple[int, int, int]]:
    if form == "flash":
        return [(256, 128, 1000), (1024, 512, 2000), LONG]
    return [(256, 128, c) for c in CLASSES] + [(768, 512, 200), (8192, 2048, 10), (8192, 2048, 200), LONG]


class Enumeration:
    """Every launch of the operators, each tile of each table included.

    Args:
        quick: only the heaviest loss and no unaligned tensors.
    """

    def __init__(self, quick: bool) -> None:
        self.found: list[Found] = []
        self.tiles: set[Any] = set()
        for operator in _kernels.TRITON:
            for arithmetic, dtype in DTYPES.items():
                with _arithmetic(arithmetic):
                    self._operator(operator, arithmetic, dtype, quick)
        self._conjugate_gradients()

    def _operator(self, operator: str, arithmetic: str, dtype: torch.dtype, quick: bool) -> None:
        variants = _variants(operator, quick)
        heavy = [one for one in variants if one.loss in HEAVY and one.aligned and one.extras]
        for variant in variants:
            done: set[tuple[str, Any]] = set()
            for form in _forms.FORMS:
                for shape in _shapes(form):
                    given = arguments(operator, shape, dtype, variant)
                    with _forms.force(form), recording() as launches, _tuning.requested() as requests:
                        try:
                            function(operator)(*given)
                        except ValueError as error:
                            if "has no form" not in str(error):
                                raise
                            continue
                    new = [(r.kernel, tile) for r in requests for tile in r.table if (r.kernel, tile) not in done]
                    if not new and variant is not variants[0]:
                        continue
                    self.found += [Found(operator, arithmetic, launch) for launch in launches]
                    for kernel, tile in new if variant in heavy else []:
                        done.add((kernel, tile))
                        self.tiles.add(tile)
                        with _forms.force(form), _tuning.using(kernel, tile), recording() as launches:
                            function(operator)(*given)
                        self.found += [Found(operator, arithmetic, launch) for launch in launches]
                    done.update(new)

    def _conjugate_gradients(self) -> None:
        module = import_module("fastmeta.triton_kernels.conjugate_gradient")
        for dtype in (torch.float32, torch.float64):
            for size in (1290, 2_049_000):
                with recording() as launches:
                    v = torch.empty(size, dtype=dtype, device="meta")
                    sums = torch.empty(module.num_partials(v), dtype=torch.float64, device="meta")
                    now = torch.empty(8, dtype=torch.float64, device="meta")
                    module.dot(v, v, sums, now)
                    module.advance(v, v, v, v, sums, sums, now)
                    module.turn(v, v, sums, sums, sums, now, now)
                name = str(dtype).removeprefix("torch.")
                self.found += [Found("solve_hessian", name, launch) for launch in launches]

    def missing_tiles(self) -> list[str]:
        """Entries of the modules' tables that no call has taken."""
        named = {
            f"{module.__name__.rsplit('.', 1)[-1]}: {tile}": tile for module in modules() for tile in _table(module)
        }
        return [name for name, tile in named.items() if tile not in self.tiles]


def modules() -> list[ModuleType]:
    """Those of ``fastmeta.triton_kernels`` that the operators are made of."""
    import sys

    return [module for name, module in sorted(sys.modules.items()) if name.startswith("fastmeta.triton_kernels.")]


def _table(module: ModuleType) -> list[Any]:
    """The tiles in the tables that a module defines."""
    found = []
    for value in vars(module).values():
        for table in value.values() if isinstance(value, dict) else [value]:
            if isinstance(table, tuple | list) and table and all(type(one).__name__.endswith("Tile") for one in table):
                found += [tile for tile in table if type(tile).__module__ == module.__name__]
    return found
