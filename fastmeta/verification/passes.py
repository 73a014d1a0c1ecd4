"""Runs every way to a derivative on a model, and judges what comes."""

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import is_dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmeta import methods as published
from fastmeta.capture import capture_features, last_linear
from fastmeta.derivatives import FiniteDifference
from fastmeta.directions import InLayers
from fastmeta.methods import Method
from fastmeta.problem import HOWS, How, InnerLoss, WholeModelProblem
from fastmeta.problem.direction import Vector
from fastmeta.problem.model_function import ModelFunction
from fastmeta.problem.of_model import label_gradient
from fastmeta.verification.report import Row, Verdict
from fastmeta.verification.snapshot import Snapshot, is_promised
from fastmeta.verification.witness import Reference, Witness, length, relative

Result = TypeVar("Result")
_RADIUS, _SMALLER_RADIUS = 0.01, 1e-4  # the default, and one that shows how a difference depends on it
_BACKWARD = "your own backward pass"


class Judged(NamedTuple):
    """A verdict without a name."""

    verdict: Verdict
    error: float | None = None
    note: str = ""


_UNKNOWN = Judged("unknown", note="there is nothing to hold it against")


class Passes:
    """Runs the package's derivatives of a model from one state.

    Args:
        model: as the user has it, with its wrappers.
        witness: of the module inside, which has testified.
    """

    def __init__(self, model: nn.Module, witness: Witness) -> None:
        self.model = model
        self.witness = witness
        self._touched: dict[str, bool] = {}  # what the current row left changed, and whether that matters

    def rows(self) -> list[Row]:
        """A row for each ``how``, and for what else reads the model."""
        needs_backward = bool(self.witness.gradients)
        return [
            *(self._row(how, functools.partial(self._how, how)) for how in HOWS),
            self._row("capture_features", self._capture),
            self._row("jvp and logits on a graph", self._on_graph, can_tell=needs_backward),
            self._row("hold-out gradient", self._gradient, can_tell=needs_backward),
            self._row("Hessian product", self._hessian, can_tell=needs_backward),
        ]

    def method_row(self, method: Method) -> Row:
        """One step on the batch, as unlabeled and as hold-out examples, on a copy of the method."""
        return self._row(type(method).__name__, functools.partial(self._method, method))

    def _row(self, name: str, run: Callable[[], Judged], *, can_tell: bool = True) -> Row:
        """The row of what ``run`` finds; whatever it raises is a refusal."""
        self._touched = {}
        judged = _UNKNOWN
        try:
            if can_tell and self.witness.repeats:
                judged = run()
        except Exception as error:  # whatever a user's model raises
            text = " ".join(str(error).split()) or "no message"
            judged = Judged("refused", note=f"{type(error).__name__}: {text[:400]}")
        finally:
            self.witness.snapshot.restore()
        harmless = bool(self._touched) and not any(self._touched.values())
        note = "; ".join(filter(None, ("without effect on the logits" if harmless else "", judged.note)))
        return Row(name, judged.verdict, judged.error, note, tuple(self._touched), harmless)

    def _observed(self, run: Callable[[], Result]) -> Result:
        """What it returns; what it leaves changed is noted and put back."""
        with self.witness.restored():
            try:
                return run()
            finally:
                changed = self.witness.snapshot.changed()
                if changed:
                    matters = any(map(is_promised, changed)) or not self._is_harmless()
                    self._touched.update(dict.fromkeys(changed, matters))

    def _is_harmless(self) -> bool:
        """Whether the next pass gives the logits that it would have given."""
        try:
            return relative(self.witness.run(grad=False), self.witness.logits) <= self.witness.tolerance / 10
        except Exception:
            return False

    def _how(self, how: How) -> Judged:
        if "difference" in how:
            return self._difference(how)
        references = self.witness.references
        if how == "last_layer":
            if self._of_head is None:
                raise ValueError(f"{last_linear(self.witness.module)[1]} has no parameter of its own that is trained")
            references = {"a direction of the last layer": self._of_head}
        results = [
            self._derivative(reference, self._tangent(reference.direction, how), f"along {name} ")
            for name, reference in references.items()
        ]
        return max(results, key=lambda judged: (judged.verdict == "disagrees", bool(judged.note), judged.error or 0.0))

    def _tangent(self, direction: Vector, how: How, radius: float = _RADIUS) -> Tensor:
        options: dict[str, Any] = {"loss": "mse", "scale": 0.5, "how": how, "radius": radius}
        return self._observed(lambda: label_gradient(self.model, self.witness.inputs, direction, **options))

    def _derivative(self, reference: Reference, tangent: Tensor, where: str = "") -> Judged:
        """Of a derivative along a direction, by whichever witnesses there are."""
        backward, difference = reference.by_backward(tangent), reference.by_differences(tangent)
        errors = [error for error in (backward, difference) if error is not None]
        if not errors:
            return _UNKNOWN
        fits_difference = difference is None or difference <= reference.allowance
        if backward is None or backward <= self.witness.tolerance:
            if fits_difference:
                return Judged("exact", errors[0])
            if backward is not None:
                return Judged("exact", backward, f"as {_BACKWARD}; {where}{difference:.1e} off the differences")
        elif difference is not None and fits_difference:
            return Judged("disagrees", max(errors), f"{where}it is what differences give, and not {_BACKWARD}")
        return Judged("disagrees", max(errors), f"{where}it is {max(errors):.0%} off")

    def _equal(self, found: Tensor, expected: Tensor, note: str, allowance: float | None = None) -> Judged:
        """Of a value of which there is another."""
        error = relative(found, expected)
        if error <= (self.witness.tolerance if allowance is None else allowance):
            return Judged("exact", error)
        return Judged("disagrees", error, note)

    def _difference(self, how: How) -> Judged:
        """Whether it is the difference of the forward pass at the same radius; its error is that of the derivative."""
        witness = self.witness
        reference = witness.references["a random direction"]
        errors, off = [], 0.0
        for radius in (_RADIUS, _SMALLER_RADIUS)[: 2 if witness.takes_differences else 1]:
            tangent = self._tangent(reference.direction, how, radius)
            if radius == _RADIUS and witness.takes_differences:
                step = radius / length(reference.direction)
                one_sided = how == "forward_difference"
                off = relative(tangent, witness.difference(reference.direction, step, one_sided=one_sided))
            found = [reference.by_backward(tangent), reference.by_differences(tangent)]
            errors.append(next((error for error in found if error is not None), float("nan")))
        if off > witness.difference_tolerance:
            note = f"{off:.0%} off the difference of two forward passes at the same radius"
            return Judged("disagrees", errors[0], note)
        if witness.dispute is not None:
            return Judged("disagrees", errors[0], f"it is not {_BACKWARD}, as no difference is")
        if errors[0] <= witness.tolerance < 1e-6:
            return Judged("exact", errors[0])
        smaller = "".join(f"; {error:.1e} at {_SMALLER_RADIUS:g}" for error in errors[1:])
        return Judged("approximate", errors[0], f"at radius {_RADIUS}{smaller}")

    def _head(self) -> dict[str, str]:
        """Names of the last linear layer's own parameters that train, and whether each is its weight or its bias."""
        own = last_linear(self.witness.module)[0]._parameters
        parameters = self.witness.parameters.items()
        return {name: kind for name, value in parameters for kind in ("weight", "bias") if value is own.get(kind)}

    @functools.cached_property
    def _of_head(self) -> Reference | None:
        """What the witnesses say of a direction of the last layer; None if it has no parameter that trains."""
        names = list(self._head())
        return self.witness.reference(self.witness.random_direction(names)) if names else None

    def _capture(self) -> Judged:
        """Whether ``features V^T + b`` is how the logits move with the captured layer."""
        witness = self.witness
        with witness.restored():
            witness.run()
            after = Snapshot(witness.module, witness.inputs)  # what a pass leaves without the tape
        layer, description = last_linear(witness.module)
        with witness.restored():
            with torch.enable_grad(), capture_features(self.model) as tape:
                logits = witness.run()
            outputs = tape.outputs(logits)
            changed = after.changed()
        if changed:
            return Judged("disagrees", note=f"reading the head changes {', '.join(changed)} beyond what a pass does")
        if "weight" in layer._parameters and not layer.weight.requires_grad:
            return Judged("disagrees", note=f"{description} is frozen and never moves: use how='jvp' with model=")
        features = outputs.features.detach()
        if self._of_head is None or "weight" not in self._head().values():  # made of others: only the product is known
            if outputs.weight is None:  # with something constant added
                return _UNKNOWN
            bias = None if outputs.bias is None else outputs.bias.to(features)
            product = functional.linear(features, outputs.weight.to(features), bias)
            return self._equal(product, logits, "features W^T + b are not the logits")
        moved = {kind: self._of_head.direction[name].to(features.dtype) for name, kind in self._head().items()}
        judged = self._derivative(self._of_head, functional.linear(features, moved["weight"], moved.get("bias")))
        if judged.verdict == "disagrees":
            note = f"the logits do not move by features V^T + b with {description}: use how='jvp' with model="
            return judged._replace(note=note)
        return judged

    def _on_graph(self) -> Judged:
        """The pass that gives a derivative and logits for the user's own backward pass."""
        witness = self.witness
        reference = witness.references["a random direction"]
        results = []
        for cotangent, expected in witness.gradients * (2 if witness.graph().scripted else 1):

            def run(cotangent: Tensor = cotangent) -> tuple[Tensor, Vector]:
                labels = torch.zeros_like(witness.logits)
                function = ModelFunction(self.model)
                problem = WholeModelProblem(function, witness.inputs, labels, how="jvp", keep_graph=True)
                tangent = problem.label_tangent(reference.direction, loss="mse", rate=0.5)
                with torch.enable_grad():
                    value = (problem.logits_on_graph * cotangent).sum()
                return tangent, witness.gradient_of(value)

            tangent, found = self._observed(run)
            results += [self._derivative(reference, tangent), self._gradients(found, expected)]
        return max(results, key=lambda judged: (judged.verdict != "exact", judged.error or 0.0))

    def _gradient(self) -> Judged:
        witness = self.witness
        found, _ = self._observed(lambda: ModelFunction(self.model).gradient(witness.inputs, witness.loss))
        return self._gradients(found, witness.loss_gradient)

    def _gradients(self, found: Vector, expected: Vector) -> Judged:
        return self._equal(self.witness.flat(found), self.witness.flat(expected), f"it is not {_BACKWARD}")

    def _hessian(self) -> Judged:
        witness = self.witness
        single = witness.logits.shape[1] == 1
        labels = torch.zeros_like(witness.logits) if single else witness.targets
        direction = witness.references["a random direction"].direction
        problem = WholeModelProblem(ModelFunction(self.model), witness.inputs, labels)
        loss = InnerLoss("mse" if single else "cross_entropy")
        found = self._observed(lambda: problem.hessian_vector_product(loss, direction))
        if not witness.takes_differences:
            return _UNKNOWN
        expected, error = witness.hessian_product(direction)
        if error > 0.1:
            return Judged("unknown", note="differences of your own gradients do not settle, as at kinks (ReLU)")
        allowance = max(witness.difference_tolerance, 10 * error)
        return self._equal(witness.flat(found), expected, "it is not the difference of your own gradients", allowance)

    def _method(self, method: Method) -> Judged:
        """Hold a step against that of the same method by double backward; where only the last layer moves, in that."""
        own = self._observed(lambda: self._step(copy.deepcopy(method)))
        defined: Any = copy.deepcopy(method)
        derivative, how = defined.derivative, method.derivative.how
        if not is_dataclass(derivative):
            raise TypeError(f"{type(derivative).__name__} has no how that could be replaced")
        if isinstance(derivative, FiniteDifference):
            return Judged("unknown", note="it is a difference by definition: see the row of its how")
        defined.derivative = replace(derivative, how="double_backward")  # type: ignore[type-var]
        if how == "last_layer":
            layer, _ = last_linear(self.witness.module)
            name = next(name for name, part in self.witness.module.named_modules() if part is layer)
            defined.direction = InLayers(defined.direction, (name,))
        with self.witness.restored():
            expected = self._step(defined)
        error = max(relative(value, wanted) for value, wanted in zip(own, expected, strict=True))
        if "difference" in how:
            return Judged("approximate", error, "against how='double_backward'")
        if error <= self.witness.tolerance:
            return Judged("exact", error)
        return Judged("disagrees", error, f"it is not the same step by how='double_backward' ({how})")

    def _step(self, method: Method) -> tuple[Tensor, Tensor, Tensor]:
        """Labels, weights, and the gradient of the loss."""
        witness, inputs = self.witness, self.witness.inputs
        index = torch.arange(len(witness.logits), device=witness.logits.device)
        with torch.enable_grad():
            refined = method.refine(
                model=self.model, unlabeled=inputs, holdout=inputs, targets=witness.targets, index=index
            )
            gradient = witness.gradient_of(refined.loss) if refined.loss.requires_grad else {}
        return refined.labels.detach(), refined.weights.detach(), witness.flat(gradient)


def method_of(method: object, witness: Witness) -> Method:
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
    examples, classes = witness.logits.shape
    sizes = {"num_examples": examples, "num_classes": classes}
    needed = {name: size for name, size in sizes.items() if name in inspect.signature(cls).parameters}
    return cls(**needed)  # type: ignore[arg-type]
