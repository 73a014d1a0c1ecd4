"""Calls of the Triton operators that between them make every launch that can be made, on tensors without memory."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from fastmeta import _kernels
from fastmeta.losses import LOSSES
from fastmeta.triton_kernels import _forms, _tuning
from fastmeta.triton_kernels._launch import Recorded, forget_plans, recording

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CLASSES = (10, 20, 50, 100, 200, 400, 1000, 2000, 4000, 8000, 30522)


class Variant(NamedTuple):
    """What a call has beside its shape."""

    loss: str = "mse_probs"  # the most to hold: the others have parts of its row functions
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


def _heavy(operator: str, form: str) -> Variant:
    """The call with the most to hold, in which every tile is taken."""
    return Variant(head=form != "rows" and operator != "hessian_vector_product")


def _light(operator: str) -> list[Variant]:
    """The other losses and layouts, at the tiles that the heuristics pick."""
    if operator in ("feature_similarity", "finite_difference_labels"):
        return [Variant(extras=False), Variant(aligned=False)]
    head = operator != "hessian_vector_product"
    found = [Variant(loss, head, aligned=False) for loss in LOSSES]
    found += [Variant(loss, extras=False, classes=True) for loss in LOSSES]
    return [*found, Variant("cross_entropy", head), Variant("cross_entropy")]


HEAVY_SHAPES = {
    "rows": [(256, 128, c) for c in CLASSES] + [(8192, 2048, c) for c in (10, 200, 1000, 30522)],
    "fused": [(256, 128, c) for c in CLASSES] + [(8192, 2048, c) for c in (10, 200, 400)],
    "flash": [(256, 128, 1000), (1024, 512, 2000), (8192, 2048, 30522)],
}
LIGHT_SHAPES = {"rows": [(256, 128, 100), (256, 128, 30522)], "fused": [(256, 128, 10)], "flash": [(1024, 512, 2000)]}


class Enumeration:
    """Every launch of the operators, each tile of each table included.

    Args:
        quick: the heaviest loss only, in two dtypes.
        architecture: of the GPU for which forms and tiles are chosen.
    """

    def __init__(self, quick: bool, architecture: int) -> None:
        self.found: list[Found] = []
        self.tiles: set[Any] = set()
        self.quick = quick
        with mock.patch.object(_forms, "chip", return_value=_forms.CHIPS[architecture]):
            for operator in _kernels.TRITON:
                for arithmetic, dtype in DTYPES.items():
                    with _arithmetic(arithmetic):
                        self._operator(operator, arithmetic, dtype)
            self._conjugate_gradients()
        forget_plans()

    def _operator(self, operator: str, arithmetic: str, dtype: torch.dtype) -> None:
        done: set[tuple[str, Any]] = set()
        for form in _forms.FORMS:
            # Rows multiply nothing: TF32 or not is the library's.
            if (arithmetic == "tf32" and form == "rows") or (arithmetic == "float16" and self.quick):
                continue
            heavy = _heavy(operator, form)
            for variant in (heavy, heavy._replace(aligned=False)):  # unaligned tensors may have tiles of their own
                for shape in HEAVY_SHAPES[form]:
                    self._launches(operator, form, arithmetic, arguments(operator, shape, dtype, variant), done)
            if not self.quick and arithmetic == "bfloat16":
                for variant, shape in itertools.product(_light(operator), LIGHT_SHAPES[form]):
                    self._launches(operator, form, arithmetic, arguments(operator, shape, dtype, variant), None)

    def _launches(
        self, operator: str, form: str, arithmetic: str, given: tuple[Any, ...], done: set[tuple[str, Any]] | None
    ) -> None:
        """Those of one call; with every tile of its tables that is not in ``done``."""
        with _forms.force(form), recording() as launches, _tuning.requested() as requests:
            try:
                function(operator)(*given)
            except ValueError as error:
                if "has no form" not in str(error):
                    raise
                return
        tiles = {(request.kernel, tile) for request in requests for tile in request.table}
        new = [] if done is None else sorted(tiles - done)
        if done is None or new or not requests:
            self.found += [Found(operator, arithmetic, launch) for launch in launches]
        for kernel, tile in new:
            with _forms.force(form), _tuning.using(kernel, tile), recording() as launches:
                function(operator)(*given)
            self.found += [Found(operator, arithmetic, launch) for launch in launches]
        if done is not None:
            done |= tiles
            self.tiles.update(tile for _, tile in tiles)

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


def missing_tiles(taken: set[Any]) -> list[str]:
    """Entries of the modules' tables that are not among those that some call has taken."""
    named = {f"{module.__name__.rsplit('.', 1)[-1]}: {tile}": tile for module in modules() for tile in _table(module)}
    return [name for name, tile in named.items() if tile not in taken]


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


def kernel_name(launch: Recorded) -> str:
    """``module.kernel``."""
    return f"{launch.kernel.__module__.rsplit('.', 1)[-1]}.{launch.kernel.fn.__name__}"


def pointer_types(launch: Recorded) -> str:
    """What the tensors hold; ``-`` for one that is not there."""
    return " ".join(str(a.dtype) if isinstance(a, Tensor) else "-" if a is None else "." for a in launch.arguments)


def constants(launch: Recorded) -> str:
    """``rows=16 classes=64 ..., 4 warps, 2 stages``."""
    named = " ".join(f"{name.removeprefix('block_')}={value}" for name, value in launch.constants.items())
    return f"{named}, {launch.options['num_warps']} warps, {launch.options['num_stages']} stages"
