"""Operator cases as data: the arguments each takes, their symbolic shapes, and the variants worth a test."""

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import error_scale
import torch
from torch import Tensor

from fastmeta import Head, losses, ops
from fastmeta.dispatch import NARROW_OUTPUTS, Operator
from fastmeta.losses import LOSSES

DEVICE = os.environ.get("FASTMETA_TEST_DEVICE", "cpu")
Arguments = dict[str, Any]
Shape = tuple[int, int, int]  # N, D, C
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Around the widths of vectors and tiles, and odd ones.
SIZES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 200)


@dataclass(frozen=True)
class Draw:
    """Random arguments on the device under test, drawn in float64 on the CPU and rounded to ``dtype``."""

    generator: torch.Generator
    dtype: torch.dtype = torch.float64

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return self._rounded(scale * torch.randn(shape, generator=self.generator, dtype=torch.float64))

    def uniform(self, *shape: int) -> Tensor:
        return self._rounded(torch.rand(shape, generator=self.generator, dtype=torch.float64))

    def probabilities(self, rows: int, columns: int) -> Tensor:
        logits = 2 * torch.randn(rows, columns, generator=self.generator, dtype=torch.float64)
        return self._rounded(logits.softmax(-1))

    def classes(self, rows: int, columns: int) -> Tensor:
        return torch.randint(columns, (rows,), generator=self.generator).to(DEVICE)

    def _rounded(self, exact: Tensor) -> Tensor:
        return exact.to(self.dtype).to(DEVICE)

    def integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=self.generator))

    def choice(self, values: Any) -> Any:
        return values[self.integer(0, len(values))]


@dataclass(frozen=True)
class Case:
    """One operator.

    Args:
        make: ``(draw, shape, variant) -> keyword arguments``, without ``loss``; a variant is a set of words.
        variants: those to test.
        shapes: symbolic shape of every tensor argument.
        per_row: the axis of N is kept, so that a row's result depends on that row alone.
    """

    name: str
    make: Callable[[Draw, Shape, frozenset[str]], Arguments]
    variants: tuple[str, ...]
    shapes: dict[str, str]
    per_row: bool
    losses: tuple[str | None, ...] = tuple(LOSSES)

    @property
    def function(self) -> Callable[..., Any]:
        return getattr(ops, self.name)

    @property
    def operator(self) -> Operator:
        return import_module(self.function.__module__).OPERATOR

    def takes(self, impl: str, dtype: torch.dtype, shape: Shape) -> bool:
        """Whether the implementation is meant for such arguments."""
        if impl == "cpp":
            return True
        few = shape[0] > 0 and 0 < shape[2] <= NARROW_OUTPUTS
        if impl == "triton" and not self.per_row and dtype.itemsize == 2 and few:
            # Its sums multiply R rounded to 16 bits, as eager PyTorch does, whose error in a few entries may be 0 by
            # chance. The narrow kernels, which keep R in float32, serve such heads.
            return False
        return dtype != torch.float64 and (impl != "cuda" or shape[2] <= NARROW_OUTPUTS or not self.narrow)

    @property
    def narrow(self) -> bool:
        """Whether its CUDA kernel is the one for few outputs."""
        return self.operator.triton is not None

    def reads_targets(self, loss: str | None) -> bool:
        """Whether targets are not optional, or the loss reads them."""
        return loss is None or self.name not in READS_TARGETS or READS_TARGETS[self.name](losses.of(loss))

    def arguments(self, draw: Draw, shape: Shape, loss: str | None, variant: str = "") -> Arguments:
        words = frozenset(variant.split())
        made = self.make(draw, shape, words)
        if loss is None:
            return made
        if "unread" not in words and not self.reads_targets(loss):
            made["targets"] = None
        return made | {"loss": loss}

    def call(self, arguments: Arguments, impl: str | None = None) -> list[Tensor]:
        """The tensors of the result; a bias of None is left out."""
        result = self.function(**arguments, impl=impl)
        return [r for r in (result if isinstance(result, tuple) else (result,)) if r is not None]

    def error_scale(self, arguments: Arguments) -> list[Tensor]:
        scale, wide = getattr(error_scale, self.name), to(arguments, torch.float64)
        if arguments.get("loss") == "huber" and "unit" in inspect.signature(scale).parameters:
            head = isinstance(arguments["logits"], Head)
            wide["unit"] = torch.finfo(arguments["features"].dtype).eps if head else 0.0
        return list(scale(**wide))

    def raw(self, arguments: Arguments) -> tuple[Any, ...]:
        """The same arguments as the registered operator takes them."""
        given: list[Any] = []
        for argument in getattr(torch.ops.fastmeta, self.name).default._schema.arguments:
            logits = arguments.get("logits")
            head = logits if isinstance(logits, Head) else None
            if argument.name == "loss":
                given.append(LOSSES[arguments["loss"]])
            elif argument.name == "logits":
                given.append(None if head is not None else logits)
            elif argument.name in ("head_weight", "head_bias"):
                given.append(None if head is None else getattr(head, argument.name.removeprefix("head_")))
            else:
                given.append(arguments.get(argument.name, DEFAULTS.get(argument.name)))
        return tuple(given)


# Operators with optional targets, and whether a loss reads them there.
READS_TARGETS: dict[str, Callable[[losses.Loss], bool]] = {
    "label_gradient": lambda loss: loss.label_tangent_reads_targets,
    "hessian_vector_product": lambda loss: loss.curvature_reads_targets,
}
DEFAULTS = {"scale": 1.0, "damping": 0.0, "bias": True, "project": True}


def map_tensors(function: Callable[[Tensor], Any], arguments: Arguments) -> Arguments:
    """The same arguments with a function applied to every tensor, those of a head included."""

    def apply(value: Any) -> Any:
        if isinstance(value, Head):
            return Head(*(apply(part) for part in value))
        return function(value) if isinstance(value, Tensor) else value

    return {name: apply(value) for name, value in arguments.items()}


def to(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """Every floating tensor in another dtype."""
    return map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, arguments)


def tensors(arguments: Arguments) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(found.append, arguments)
    return found


def _logits(draw: Draw, shape: Shape, variant: frozenset[str]) -> Tensor | Head:
    n, d, c = shape
    if "head" in variant:
        weight = draw.normal(c, d, scale=2 / max(d, 1) ** 0.5)
        return Head(weight, None if "head-without-bias" in variant else draw.normal(c))
    return draw.normal(n, c, scale=2.0)


def _targets(draw: Draw, shape: Shape, variant: frozenset[str]) -> Tensor:
    n, _, c = shape
    if "classes" in variant:
        return draw.classes(n, c)
    return draw.uniform(n, c) if "unnormalized" in variant else draw.probabilities(n, c)


def _direction(draw: Draw, shape: Shape, variant: frozenset[str]) -> Arguments:
    _, d, c = shape
    return {"direction_weight": draw.normal(c, d), "direction_bias": draw.normal(c) if "bias" in variant else None}


def _weights(draw: Draw, shape: Shape, variant: frozenset[str]) -> Tensor | None:
    return draw.normal(shape[0]) if "weights" in variant else None


def _last_layer_gradient(draw: Draw, shape: Shape, variant: frozenset[str]) -> Arguments:
    return {
        "features": draw.normal(*shape[:2]),
        "logits": _logits(draw, shape, variant),
        "targets": _targets(draw, shape, variant),
        "weights": _weights(draw, shape, variant),
    }


def _per_example_dot(draw: Draw, shape: Shape, variant: frozenset[str]) -> Arguments:
    return {
        "features": draw.normal(*shape[:2]),
        "logits": _logits(draw, shape, variant),
        "targets": _targets(draw, shape, variant),
        **_direction(draw, shape, variant),
    }


def _label_gradient(draw: Draw, shape: Shape, variant: frozenset[str]) -> Arguments:
    return {
        "features": draw.normal(*shape[:2]),
        "logits": _logits(draw, shape, variant),
        **_direction(draw, shape, variant),
        "scale": -0.7 if "scale" in variant else 1.0,
        "targets": _targets(draw, shape, variant),
    }


def _hessian_vector_product(draw: Draw, shape: Shape, variant: frozenset[str]) -> Arguments:
    return {
        "features": draw.normal(*shape[:2]),
        "logits": _logits(draw, shape, variant),
        **_direction(draw, shape, variant),
        "weights": _weights(draw, shape, variant),
        "damping": 0.3 if "damping" in variant else 0.0,
        "targets": _targets(draw, shape, variant),
    }


def _feature_similarity(draw: Draw, shape: Shape, variant: frozenset[str]) -> Arguments:
    n, d, c = shape
    held_out = draw.choice(SIZES)
    return {
        "features_u": draw.normal(n, d),
        "features_h": draw.normal(held_out, d),
        "residual_h": draw.normal(held_out, c),
        "scale": -0.7 if "scale" in variant else 1.0,
        "bias": "bias" in variant,
    }


def _finite_difference_labels(draw: Draw, shape: Shape, variant: frozenset[str]) -> Arguments:
    n, _, c = shape
    return {
        "logits_plus": draw.normal(n, c, scale=2.0),
        "logits_minus": draw.normal(n, c, scale=2.0),
        "labels": draw.probabilities(n, c),
        "epsilon": torch.full((1,) if "epsilon1d" in variant else (), 0.25, dtype=draw.choice(DTYPES), device=DEVICE),
        "step": 0.2,
        "project": "project" in variant,
    }


CASES = (
    Case(
        "last_layer_gradient",
        _last_layer_gradient,
        ("", "weights unnormalized", "classes", "head weights", "head head-without-bias classes weights"),
        {"features": "ND", "logits": "NC", "targets": "NC", "weights": "N"},
        per_row=False,
    ),
    Case(
        "per_example_dot",
        _per_example_dot,
        ("bias", "unnormalized", "classes bias", "head bias", "head head-without-bias classes"),
        {"features": "ND", "logits": "NC", "targets": "NC", "direction_weight": "CD", "direction_bias": "C"},
        per_row=True,
    ),
    Case(
        "label_gradient",
        _label_gradient,
        ("bias", "scale", "head bias scale unread", "head head-without-bias classes"),
        {"features": "ND", "logits": "NC", "targets": "NC", "direction_weight": "CD", "direction_bias": "C"},
        per_row=True,
    ),
    Case(
        "hessian_vector_product",
        _hessian_vector_product,
        ("bias", "weights", "bias weights damping unread", "damping classes"),
        {
            "features": "ND",
            "logits": "NC",
            "targets": "NC",
            "direction_weight": "CD",
            "direction_bias": "C",
            "weights": "N",
        },
        per_row=False,
    ),
    Case(
        "feature_similarity",
        _feature_similarity,
        ("bias", "scale", "bias scale"),
        {"features_u": "ND", "features_h": "HD", "residual_h": "HC"},
        per_row=True,
        losses=(None,),
    ),
    Case(
        "finite_difference_labels",
        _finite_difference_labels,
        ("project", "", "project epsilon1d"),
        {"logits_plus": "NC", "logits_minus": "NC", "labels": "NC"},
        per_row=True,
        losses=(None,),
    ),
)
CASE_LOSSES = [(case, loss) for case in CASES for loss in case.losses]
CASE_LOSS_IDS = [case.name if loss is None else f"{case.name}-{loss}" for case, loss in CASE_LOSSES]
