"""One step of a method against the same step by the definition of its derivative."""

import copy
import inspect
from dataclasses import is_dataclass, replace
from typing import Any

import torch

from fastmeta import methods as published
from fastmeta.capture import last_linear
from fastmeta.derivatives import FiniteDifference
from fastmeta.directions import InLayers
from fastmeta.methods import Method
from fastmeta.problem.direction import Vector
from fastmeta.updates import Refined
from fastmeta.verification.judge import Judge
from fastmeta.verification.passes import Judged, Passes
from fastmeta.verification.report import Row
from fastmeta.verification.witness import dense, relative


def made(method: object, judge: Judge) -> Method:
    """The method itself, or one with the defaults of the class of this name.

    Raises:
        ValueError: there is no such class.
        TypeError: neither a method nor a name.
    """
    if isinstance(method, Method):
        return method
    if not isinstance(method, str):
        raise TypeError(f"methods must be methods or names of their classes, got {type(method).__name__}")
    cls: Any = getattr(published, method, None)
    if not (isinstance(cls, type) and issubclass(cls, Method) and cls is not Method):
        known = [name for name in published.__all__ if name not in ("Method", "Refined", "Batch")]
        raise ValueError(f"methods must be methods or names of their classes ({', '.join(known)}), got {method!r}")
    examples, classes = judge.witness.logits.shape
    sizes = {"num_examples": examples, "num_classes": classes}
    needed = {name: size for name, size in sizes.items() if name in inspect.signature(cls).parameters}
    return cls(**needed)  # type: ignore[arg-type]


def row_of(method: Method, passes: Passes) -> Row:
    """One step on the batch, as unlabeled and as hold-out examples, on a copy of the method.

    The definition is the same method by ``how="double_backward"``; where only the last layer moves, in that layer.
    """
    how = method.derivative.how

    def step() -> Judged:
        own = passes.observed(lambda: _step(copy.deepcopy(method), passes))
        defined = copy.deepcopy(method)
        if not is_dataclass(defined.derivative):
            raise TypeError(f"{type(defined.derivative).__name__} has no how that could be replaced")
        derivative: Any = defined.derivative
        if isinstance(derivative, FiniteDifference):
            return Judged("unknown", None, "it is a difference by definition: see the row of its how")
        defined.derivative = replace(derivative, how="double_backward")
        if how == "last_layer":
            layer, _ = last_linear(passes.witness.module)
            name = next(name for name, part in passes.witness.module.named_modules() if part is layer)
            defined.direction = InLayers(defined.direction, (name,))
        expected = _step(defined, passes)
        passes.witness.state.restore()
        error = max(relative(value, wanted) for value, wanted in zip(own, expected, strict=True))
        if "difference" in how:
            return Judged("approximate", error, "against how='double_backward'")
        if error <= passes.judge.tolerance.backward:
            return Judged("exact", error)
        return Judged("disagrees", error, f"it is not the same step by how='double_backward' ({how})")

    return passes.row(type(method).__name__, step)


def _step(method: Method, passes: Passes) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Labels, weights, and the gradient of the loss."""
    witness = passes.witness
    index = torch.arange(len(witness.logits), device=witness.logits.device)
    inputs = witness.inputs
    with torch.enable_grad():
        refined: Refined = method.refine(
            model=passes.model, unlabeled=inputs, holdout=inputs, targets=witness.targets, index=index
        )
        gradient: Vector = witness.gradient_of(refined.loss) if refined.loss.requires_grad else {}
    parts = [gradient[name] if name in gradient else torch.zeros_like(p) for name, p in witness.parameters.items()]
    return refined.labels.detach(), refined.weights.detach(), torch.cat([dense(part).flatten() for part in parts])
