"""Runs every way to a derivative on a model, and judges what comes."""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmeta.capture import capture_features, last_linear
from fastmeta.problem import HOWS, How, InnerLoss, WholeModelProblem
from fastmeta.problem.direction import Vector
from fastmeta.problem.model_function import ModelFunction
from fastmeta.problem.of_model import label_gradient
from fastmeta.verification.judge import Judge, Reference
from fastmeta.verification.report import Row, Verdict
from fastmeta.verification.state import State, is_promised
from fastmeta.verification.witness import dense, length, relative

Result = TypeVar("Result")
_DEFAULT_RADIUS = 0.01
_OTHER_RADIUS = 1e-4


class Judged(NamedTuple):
    """A verdict without a name."""

    verdict: Verdict
    error: float | None
    note: str = ""


_UNKNOWN = Judged("unknown", None, "there is nothing to hold it against")


class Passes:
    """Runs the package's derivatives of a model from one state.

    Args:
        model: as the user has it, with its wrappers.
        judge: of the module inside.
    """

    def __init__(self, model: nn.Module, judge: Judge) -> None:
        self.model = model
        self.judge = judge
        self.witness = judge.witness

    def rows(self) -> list[Row]:
        """A row for each ``how``, and for what else reads the model."""
        return [
            *(self.row(how, functools.partial(self._how, how)) for how in HOWS),
            self.row("capture_features", self._capture),
            self.row("jvp and logits on a graph", self._on_graph),
            self.row("hold-out gradient", self._gradient),
            self.row("Hessian product", self._hessian),
        ]

    def row(self, name: str, run: Callable[[], Judged]) -> Row:
        """The row of what ``run`` finds; whatever it raises is a refusal."""
        self._touched: dict[str, bool] = {}
        try:
            judged = run()
        except Exception as error:  # whatever a user's model raises
            text = " ".join(str(error).split()) or "no message"
            judged = Judged("refused", None, f"{type(error).__name__}: {text[:400]}")
        finally:
            self.witness.state.restore()
        harmless = bool(self._touched) and not any(self._touched.values())
        note = "; ".join(filter(None, ("without effect on the logits" if harmless else "", judged.note)))
        return Row(name, judged.verdict, judged.error, note, tuple(self._touched), harmless)

    def observed(self, run: Callable[[], Result]) -> Result:
        """What it returns; what it leaves changed is noted and put back."""
        state = self.witness.state
        try:
            return run()
        finally:
            try:
                touched = state.touched()
                if touched:
                    matters = any(map(is_promised, touched)) or not self._is_harmless()
                    self._touched.update(dict.fromkeys(touched, matters))
            finally:
                state.restore()

    def _is_harmless(self) -> bool:
        """Whether the next pass gives the logits that it would have given."""
        try:
            with torch.no_grad():
                return relative(self.witness.call(), self.witness.logits) <= self.judge.tolerance.backward / 10
        except Exception:
            return False

    def _how(self, how: How) -> Judged:
        if how == "last_layer":
            if self._of_head is None:
                _, description = last_linear(self.witness.module)
                raise ValueError(f"{description} has no parameter of its own that is trained")
            return self._judged({"a direction of the last layer": self._of_head}, how)
        return self._difference(how) if "difference" in how else self._judged(self.judge.references, how)

    @functools.cached_property
    def _of_head(self) -> Reference | None:
        """What the witnesses say of a direction of the last layer; None if it has no parameter that trains."""
        names = [name for name in _head(self.witness.module) if name in self.witness.parameters]
        return self.judge.of(self.witness.random_direction(self.judge.generator, names)) if names else None

    def _tangent(self, direction: Vector, how: How, radius: float = _DEFAULT_RADIUS) -> Tensor:
        def run() -> Tensor:
            inputs = self.witness.inputs
            return label_gradient(self.model, inputs, direction, loss="mse", scale=0.5, how=how, radius=radius)

        return self.observed(run)

    def _judged(self, references: dict[str, Reference], how: How) -> Judged:
        results = [
            self._verdict(reference, self._tangent(reference.direction, how), f"along {name} ")
            for name, reference in references.items()
        ]
        return max(results, key=lambda judged: (judged.verdict == "disagrees", judged.error or 0.0))

    def _verdict(self, reference: Reference, tangent: Tensor, where: str = "") -> Judged:
        """Compare with whichever witnesses there are."""
        judge = self.judge
        backward = reference.by_backward(tangent)
        difference = reference.by_differences(tangent)
        if not judge.repeats or (backward is None and difference is None):
            return _UNKNOWN
        fits_backward = backward is None or backward <= judge.tolerance.backward
        fits_difference = difference is None or difference <= judge.allowance(reference)
        if fits_backward and fits_difference:
            return Judged("exact", difference if backward is None else backward)
        if fits_backward and backward is not None:
            return Judged("exact", backward, f"as your own backward pass; {where}{difference:.1e} off the differences")
        error = max(value for value in (backward, difference) if value is not None)
        if fits_difference and difference is not None:
            return Judged("disagrees", error, f"{where}it is what differences give, and not your own backward pass")
        return Judged("disagrees", error, f"{where}it is {error:.0%} off")

    def _difference(self, how: How) -> Judged:
        """Whether it is the difference of the forward pass at the same radius; its error is that of the derivative."""
        judge = self.judge
        reference = judge.references["a random direction"]
        if not judge.repeats:
            return _UNKNOWN
        errors: dict[float, float] = {}
        off = 0.0
        for radius in (_DEFAULT_RADIUS, _OTHER_RADIUS) if judge.takes_differences else (_DEFAULT_RADIUS,):
            tangent = self._tangent(reference.direction, how, radius)
            if radius == _DEFAULT_RADIUS and judge.takes_differences:
                step = radius / length(reference.direction)
                one_sided = how == "forward_difference"
                off = relative(tangent, self.witness.difference(reference.direction, step, one_sided=one_sided))
            found = [reference.by_backward(tangent), reference.by_differences(tangent)]
            errors[radius] = next((error for error in found if error is not None), float("nan"))
        first = errors[_DEFAULT_RADIUS]
        if off > judge.tolerance.difference:
            return Judged("disagrees", first, f"{off:.0%} off the difference of two forward passes at the same radius")
        if judge.dispute is not None:
            return Judged("disagrees", first, "it is not your own backward pass, as no difference is")
        if first <= judge.tolerance.backward and judge.tolerance.backward < 1e-6:
            return Judged("exact", first)
        others = "".join(
            f"; {error:.1e} at {radius:g}" for radius, error in errors.items() if radius != _DEFAULT_RADIUS
        )
        return Judged("approximate", first, f"at radius {_DEFAULT_RADIUS}{others}")

    def _capture(self) -> Judged:
        """Whether ``features V^T + b`` is how the logits move with the captured layer."""
        witness = self.witness
        with witness.restored(), torch.enable_grad():
            witness.call()
            after = State(witness.module, witness.inputs)  # what a pass leaves without the tape
        layer, description = last_linear(witness.module)
        try:
            with torch.enable_grad(), capture_features(self.model) as tape:
                logits = witness.call()
            outputs = tape.outputs(logits)
            touched = after.touched()
        finally:
            witness.state.restore()
        if touched:
            return Judged("disagrees", None, f"reading the head changes {', '.join(touched)} beyond what a pass does")
        names = _head(witness.module)
        if "weight" in layer._parameters and not layer.weight.requires_grad:
            return Judged("disagrees", None, f"{description} is frozen and never moves: use how='jvp' with model=")
        features, weight, bias = (None if t is None else t.detach() for t in (outputs.features, *outputs[2:]))
        assert features is not None
        assert weight is not None
        own = {name: kind for name, kind in names.items() if name in witness.parameters}
        if self._of_head is None or "weight" not in own.values():  # made of others: only the product can be compared
            product = functional.linear(features, weight.to(features), None if bias is None else bias.to(features))
            error = relative(product, logits.detach())
            verdict: Verdict = "exact" if error <= self.judge.tolerance.backward else "disagrees"
            return Judged(verdict, error, "" if verdict == "exact" else "features W^T + b are not the logits")
        moved = {kind: self._of_head.direction[name].to(features.dtype) for name, kind in own.items()}
        judged = self._verdict(self._of_head, functional.linear(features, moved["weight"], moved.get("bias")))
        if judged.verdict == "disagrees":
            note = f"the logits do not move by features V^T + b with {description}: use how='jvp' with model="
            return judged._replace(note=note)
        return judged

    def _on_graph(self) -> Judged:
        """The pass that gives a derivative and logits for the user's own backward pass."""
        if not self.judge.gradients or not self.judge.repeats:
            return _UNKNOWN
        worst = Judged("exact", 0.0)
        reference = self.judge.references["a random direction"]
        for cotangent, expected in self.judge.gradients * (2 if self.witness.graph().scripted else 1):

            def run(cotangent: Tensor = cotangent) -> tuple[Tensor, Vector]:
                function = ModelFunction(self.model)
                labels = torch.zeros_like(self.witness.logits)
                problem = WholeModelProblem(function, self.witness.inputs, labels, how="jvp", keep_graph=True)
                tangent = problem.label_tangent(reference.direction, loss="mse", rate=0.5)
                with torch.enable_grad():
                    value = (problem.logits_on_graph * cotangent).sum()
                return tangent, self.witness.gradient_of(value)

            tangent, found = self.observed(run)
            for judged in (
                self._verdict(reference, tangent),
                self._flat(found, expected, self.judge.tolerance.backward, "your own backward pass"),
            ):
                if judged.verdict != "exact" or (judged.error or 0.0) > (worst.error or 0.0):
                    worst = judged
                if judged.verdict != "exact":
                    return worst
        return worst

    def _gradient(self) -> Judged:
        if not self.judge.loss_gradient or not self.judge.repeats:
            return _UNKNOWN
        function = ModelFunction(self.model)
        found, _ = self.observed(lambda: function.gradient(self.witness.inputs, self.witness.loss))
        return self._flat(found, self.judge.loss_gradient, self.judge.tolerance.backward, "your own backward pass")

    def _hessian(self) -> Judged:
        if not self.judge.loss_gradient or not self.judge.repeats:
            return _UNKNOWN
        witness = self.witness
        if witness.logits.shape[1] == 1:
            labels, loss = torch.zeros_like(witness.logits), "mse"
        else:
            labels, loss = witness.targets, "cross_entropy"
        direction = self.judge.references["a random direction"].direction
        problem = WholeModelProblem(ModelFunction(self.model), witness.inputs, labels)
        found = self.observed(lambda: problem.hessian_vector_product(InnerLoss(loss), direction))
        if not self.judge.takes_differences:
            return _UNKNOWN
        expected = witness.hessian_product(direction)
        flat = torch.cat([dense(found[name]).flatten() for name in witness.parameters])
        error = relative(flat, expected.value)
        allowance = max(self.judge.tolerance.difference, 10 * expected.error)
        if expected.error > 0.1:
            return Judged("unknown", None, "differences of your own gradients do not settle, as at kinks (ReLU)")
        if error <= allowance:
            return Judged("exact", error)
        return Judged("disagrees", error, "it is not the difference of your own gradients")

    def _flat(self, found: Vector, expected: Vector, allowance: float, what: str) -> Judged:
        zeros = {name: torch.zeros_like(p) for name, p in self.witness.parameters.items()}
        first, second = (
            torch.cat([dense({**zeros, **part}[name]).flatten() for name in zeros]) for part in (found, expected)
        )
        error = relative(first, second)
        return Judged("exact", error) if error <= allowance else Judged("disagrees", error, f"it is not {what}")


def _head(module: nn.Module) -> dict[str, str]:
    """Names of the last linear layer's own parameters in the model, and whether each is its weight or its bias."""
    layer, _ = last_linear(module)
    return {
        name: kind
        for name, value in module.named_parameters()
        for kind in ("weight", "bias")
        if value is layer._parameters.get(kind)
    }
