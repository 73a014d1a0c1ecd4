"""Calls of the Triton operators that between them make every launch that can be made, on tensors without memory."""

import contextlib
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import kernels
from bench.inputs import SHAPES
from fastmeta.dispatch import OPERATORS
from fastmeta.losses import BY_CODE, LOSSES

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Classes at which the tiles change, and sizes at which rows of 16 bytes, one program a row and several slabs begin.
CLASSES = (10, 20, 50, 100, 200, 400, 1000, 2000, 4000, 8000, 30522)
LARGE = (10, 1000, 30522)


class Specimen(NamedTuple):
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
    launch: Any


def _tensor(shape: tuple[int, ...], dtype: torch.dtype, aligned: bool) -> Tensor:
    """Without memory; at an odd address, with an odd row stride, if it is not aligned."""
    if aligned or not shape:
        return torch.empty(shape, dtype=dtype, device="meta")
    columns = shape[-1] + (1 - shape[-1] % 2)
    strides = (columns, 1) if len(shape) == 2 else (1,)
    return torch.empty(math.prod(shape[:-1]) * columns + 1, dtype=dtype, device="meta").as_strided(shape, strides, 1)


def arguments(operator: str, shape: tuple[int, int, int], dtype: torch.dtype, variant: Specimen) -> tuple[Any, ...]:
    """The arguments of the registered schema (csrc/operators.cpp)."""
    n, d, c = shape

    def tensor(*size: int, of: torch.dtype = dtype) -> Tensor:
        return _tensor(size, of, variant.aligned)

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
    of_loss = BY_CODE[loss]
    if operator == "label_gradient":
        read = targets if of_loss.label_tangent_reads_targets else None
        return tensor(n, d), *outputs, read, tensor(c, d), bias, loss, 0.5
    read = targets if of_loss.curvature_reads_targets else None
    return tensor(n, d), tensor(n, c), read, tensor(c, d), bias, weights, loss, 0.1


@contextlib.contextmanager
def _arithmetic(name: str) -> Iterator[None]:
    """TF32 for float32 products, or not."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32" if name == "tf32" else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def calls(operator: str, quick: bool) -> Iterator[tuple[str, tuple[int, int, int], Specimen]]:
    """Arithmetic, shape and variant: the heaviest in every tile; the other losses and layouts; what is measured."""
    losses = operator not in ("feature_similarity", "finite_difference_labels")
    heads = (False, True) if losses and operator != "hessian_vector_product" else (False,)
    heavy = [Specimen(head=head, aligned=aligned) for head in heads for aligned in (True, False)]
    shapes = [(256, 128, c) for c in (CLASSES[::3] if quick else CLASSES)] + [(8192, 2048, c) for c in LARGE]
    for arithmetic in ("float32", "bfloat16") if quick else DTYPES:
        yield from ((arithmetic, *one) for one in itertools.product(shapes, heavy))
    if quick:
        return
    light = [Specimen(extras=False), Specimen(extras=False, aligned=False)]
    if losses:
        light += [
            Specimen(loss, head, not classes, classes, aligned)
            for loss, head, classes, aligned in itertools.product(LOSSES, heads, (False, True), (True, False))
        ]
    yield from (("bfloat16", *one) for one in itertools.product([(256, 128, 20), (256, 128, 4000)], light))
    measured = [Specimen("cross_entropy", head, classes=head) for head in heads]
    for arithmetic in ("float32", "bfloat16"):
        yield from ((arithmetic, *one) for one in itertools.product(SHAPES["cuda"], measured))


def launches(quick: bool) -> list[Found]:
    """The launches of the operators and of the conjugate gradient; many of them Triton compiles alike."""
    found = []
    for dtype, size in itertools.product((torch.float32, torch.float64), (1290, 2_049_000)):
        name = str(dtype).removeprefix("torch.")
        found += [Found("solve_hessian", name, launch) for launch in kernels.launches_of_solver(size, dtype)]
    for operator in (name for name, each in OPERATORS.items() if each.triton):
        for arithmetic, shape, variant in dict.fromkeys(calls(operator, quick)):
            given = arguments(operator, shape, DTYPES[arithmetic], variant)
            with _arithmetic(arithmetic):
                made = kernels.launches_of(operator, shape[2], given)
            found += [Found(operator, arithmetic, launch) for launch in made]
    return found


def kernel_name(launch: Any) -> str:
    """``module.kernel``."""
    return f"{launch.kernel.__module__.rsplit('.', 1)[-1]}.{launch.kernel.fn.__name__}"


def pointer_types(launch: Any) -> str:
    """What the tensors hold; ``-`` for one that is not there."""
    return " ".join(str(a.dtype) if isinstance(a, Tensor) else "-" if a is None else "." for a in launch.arguments)


def constants(launch: Any) -> str:
    """``rows=16 classes=64 ..., 4 warps, 2 stages``."""
    named = " ".join(f"{name.removeprefix('block_')}={value}" for name, value in launch.constants.items())
    return f"{named}, {launch.options['num_warps']} warps, {launch.options['num_stages']} stages"
