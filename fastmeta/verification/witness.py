"""What a model's derivatives are, by plain PyTorch and none of the package's own evaluations.

Two witnesses that have nothing in common: the user's own backward pass, and differences of the forward pass.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmeta import checks
from fastmeta.problem.direction import Vector
from fastmeta.problem.model_logits import logits_of
from fastmeta.problem.targets import as_rows
from fastmeta.verification.snapshot import Snapshot

# Of differences, relative to the length of the parameters; more are tried where the first three do not agree.
_RADII = (1e-4, 1e-5, 1e-6, 1e-7, 1e-2, 1e-3)
_RADII_IN_SINGLE = (1e-2, 3e-3, 1e-3, 3e-4, 3e-2)
_AGREEMENT = 1e-4
# The largest relative errors that are rounding: against the user's own backward pass, and against differences.
_TOLERANCES = {torch.float64: (1e-7, 1e-5), torch.float32: (1e-3, 3e-2)}
_TOLERANCES_IN_HALF = (0.15, 0.3)
_MOST_TRIED = 24  # parameters that are looked at one by one


class Reference(NamedTuple):
    """The derivative along one direction, by both witnesses."""

    direction: Vector
    products: list[tuple[Tensor, float]]  # u [N, C] and <u, D_v f> by the user's own backward pass
    differences: Tensor | None  # D_v f [N, C]; None if they are not taken, or depend on the radius
    allowance: float  # how far from the differences a right derivative may be

    def by_backward(self, tangent: Tensor) -> float | None:
        """Error of ``D_v f [N, C]`` by the user's own backward pass; None if there is none."""
        return max((_gap(tangent, u, product) for u, product in self.products), default=None)

    def by_differences(self, tangent: Tensor) -> float | None:
        """Error of ``D_v f [N, C]`` by differences of the forward pass."""
        return None if self.differences is None else relative(tangent, self.differences)


class Graph(NamedTuple):
    """What the graph of autograd behind the logits consists of."""

    leaves: list[Tensor]  # that require grad
    functions: list[str]  # classes of custom torch.autograd.Function
    scripted: bool  # whether TorchScript differentiates a part of it


class Witness:
    """A model that is put back, with everything that can be seen of it, after each pass.

    Args:
        module: the model.
        inputs: of N examples: an exact tuple's are positional, a mapping's are by name, anything else is one argument.
        targets: int64 classes ``[N]`` or ``[N, C]``; None: the classes that the model predicts.
        backward: whether ``.backward()`` may be called; else ``torch.autograd.grad``, which runs no hook of gradients.
    """

    def __init__(self, module: nn.Module, inputs: Any, targets: Tensor | None, *, backward: bool) -> None:
        self.module = module
        self.inputs = inputs
        self._targets = targets
        self._backward = backward
        self.snapshot = Snapshot(module, inputs)
        named = dict(module.named_parameters())
        self.parameters: Vector = {name: value for name, value in named.items() if value.requires_grad}
        self.others_with_gradient: list[str] = []  # tensors that a backward pass reaches beside the parameters
        with self.restored():
            self.logits = self.run().detach()  # [N, C]
            self.changes_by_forward = self.snapshot.changed()
        with self.restored():
            self.gap = relative(self.run().detach(), self.logits)  # between two passes from the same state
        self.tolerance, self.difference_tolerance = _TOLERANCES.get(self.logits.dtype, _TOLERANCES_IN_HALF)
        self.repeats = self.gap <= self.tolerance / 10

    def testify(self, *, differences: bool) -> None:
        """Find what both witnesses say along a random direction and along the gradient of a loss.

        Args:
            differences: whether to take any; else the user's own backward pass is the only witness.
        """
        self.takes_differences = differences and self.repeats
        self.generator = torch.Generator().manual_seed(0)
        noise = torch.randn((2, *self.logits.shape), generator=self.generator, dtype=torch.float64).to(self.logits)
        self.gradients: list[tuple[Tensor, Vector]] = []  # u [N, C] and J^T u
        self.loss_gradient: Vector = {}
        self.no_backward = ""  # why there is no backward pass
        try:
            gradients = [(u, self.gradient(lambda logits, u=u: (logits * u).sum())) for u in noise]  # type: ignore[misc]
            self.loss_gradient = self.gradient(self.loss)
            self.gradients = gradients
        except Exception as error:  # whatever a user's model raises
            self.no_backward = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        everything = self.random_direction()
        self.references = {"a random direction": self.reference(everything)}
        whole = {name: self.loss_gradient[name] for name in everything if name in self.loss_gradient}
        if 0 < inner(whole, whole) < float("inf"):
            self.references["the gradient of a loss"] = self.reference(whole)

    def reference(self, direction: Vector) -> Reference:
        """What both witnesses say of a direction."""
        products = [(u, inner(gradient, direction)) for u, gradient in self.gradients]
        if not self.takes_differences:
            return Reference(direction, products, None, self.difference_tolerance)
        here = self._at(direction, 0.0)
        sides: dict[float, tuple[Tensor, Tensor]] = {}

        def central(step: float) -> Tensor:
            sides[step] = self._at(direction, step), self._at(direction, -step)
            return (sides[step][0] - sides[step][1]) / (2 * step)

        value, error, step = _steadiest(central, self._steps(direction))
        plus, minus = sides[step]
        kink = relative(plus - here, here - minus)  # a step over one leaves the difference of the slopes to both sides
        allowance = max(self.difference_tolerance, 10 * error, 2 * kink)
        return Reference(direction, products, value if error <= 0.05 else None, allowance)

    @functools.cached_property
    def dispute(self) -> float | None:
        """By how much the two witnesses differ, where that is more than rounding."""
        gaps = [self._dispute_of(reference) for reference in self.references.values()]
        return max((gap for gap in gaps if gap > 0), default=None)

    def disputed_parameters(self) -> tuple[list[str], list[str]]:
        """Parameters whose derivative the user's own backward pass has otherwise than differences.

        Returns:
            Those that it does not reach at all, and the others.
        """
        direction, _, whole, _ = self.references["a random direction"]
        reached = list(self.gradients[0][1])

        def is_disputed(name: str) -> bool:
            alone = self.reference({name: direction[name]})
            if whole is None or alone.differences is None:
                return False
            share = (alone.differences.norm() / whole.norm().clamp_min(1e-30)).item()
            return share > self.difference_tolerance and self._dispute_of(alone, 3) > 0

        return (
            [name for name in direction if name not in reached and is_disputed(name)],
            [name for name in reached[:_MOST_TRIED] if is_disputed(name)],
        )

    def _dispute_of(self, reference: Reference, factor: float = 1) -> float:
        """The gap between the witnesses, or 0 where it is within ``factor`` allowances."""
        gap = None if reference.differences is None else reference.by_backward(reference.differences)
        return gap if gap is not None and gap > factor * reference.allowance else 0.0

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """After the block everything is as it was."""
        try:
            yield
        finally:
            self.snapshot.restore()

    def run(self, *, grad: bool = True) -> Tensor:
        """The logits ``[N, C]`` of one call.

        With a graph, as a training step has it: TorchScript keeps what it has seen in its first passes.
        """
        with torch.set_grad_enabled(grad), torch.compiler.set_stance("force_eager"):
            if isinstance(self.inputs, Mapping):
                output = self.module(**self.inputs)
            else:
                output = self.module(*(self.inputs if type(self.inputs) is tuple else (self.inputs,)))
            return logits_of(output)

    def loss(self, logits: Tensor) -> Tensor:
        """Mean cross-entropy, or the mean square of a single output: a smooth function of the logits."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if logits.shape[1] == 1:
            return logits.square().mean()
        targets = self.targets
        return functional.cross_entropy(logits, targets.to(logits) if targets.is_floating_point() else targets)

    @property
    def targets(self) -> Tensor:
        """Given, or predicted, as are those of class -100. ``[N]`` or ``[N, C]``."""
        predicted = self.logits.argmax(1)
        if self._targets is None:
            return predicted
        given = as_rows(self._targets, len(predicted))
        return given if given.is_floating_point() else torch.where(given == checks.IGNORED, predicted, given)

    def gradient(self, loss: Callable[[Tensor], Tensor], shift: Vector | None = None, factor: float = 0.0) -> Vector:
        """Gradient of ``loss(logits)`` at ``theta + factor shift`` by the user's own backward pass."""
        with self.restored():
            self._move(shift or {}, factor)
            with torch.enable_grad():
                value = loss(self.run())
            return self.gradient_of(value)

    def gradient_of(self, value: Tensor) -> Vector:
        """Gradient of a scalar by the parameters, without those that it does not reach.

        Where ``.backward()`` may be called it is, because autograd.grad sees less: nothing inside of reentrant
        checkpoints, and nothing that a Function's backward passes on by itself.
        """
        own = list(self.parameters.values())
        if not self._backward:
            found: Sequence[Tensor | None] = torch.autograd.grad(value, own, allow_unused=True)
        else:
            leaves = [(name, t) for name, t in self.snapshot.tensors.values() if t.is_leaf and t.requires_grad]
            before = [leaf.grad for _, leaf in leaves]
            try:
                for _, leaf in leaves:
                    leaf.grad = None
                value.backward()
                found = tuple(parameter.grad for parameter in own)
                others = [name for name, leaf in leaves if leaf.grad is not None and id(leaf) not in map(id, own)]
                self.others_with_gradient = others
            finally:
                for (_, leaf), gradient in zip(leaves, before, strict=True):
                    leaf.grad = gradient
        return {name: g.detach().to_dense() for name, g in zip(self.parameters, found, strict=True) if g is not None}

    def graph(self) -> Graph:
        """What is behind the logits of one pass."""
        with self.restored():
            logits = self.run()
        todo: list[Any] = [torch.autograd.graph.get_gradient_edge(logits).node] if logits.requires_grad else []
        nodes: dict[Any, None] = {}
        while todo:
            node = todo.pop()
            if node is not None and node not in nodes:
                nodes[node] = None
                todo += [parent for parent, _ in node.next_functions]
        custom = {type(node).__name__ for node in nodes if isinstance(node, torch.autograd.function.BackwardCFunction)}
        return Graph(
            [node.variable for node in nodes if hasattr(node, "variable")],
            sorted(name.removesuffix("Backward") for name in custom),
            any("jit" in node.name() or "DifferentiableGraph" in node.name() for node in nodes),
        )

    def difference(self, direction: Vector, step: float, *, one_sided: bool = False) -> Tensor:
        """``(f(theta + step v) - f(theta - step v)) / 2 step``, or to one side. ``[N, C]``."""
        plus = self._at(direction, step)
        return (plus - self._at(direction, 0.0 if one_sided else -step)) / (step if one_sided else 2 * step)

    def hessian_product(self, direction: Vector) -> tuple[Tensor, float]:
        """``H v`` of the loss by differences of the user's own gradients, flat ``[P]``, and its error."""

        def central(step: float) -> Tensor:
            plus, minus = (self.flat(self.gradient(self.loss, direction, side)) for side in (step, -step))
            return (plus - minus) / (2 * step)

        return _steadiest(central, self._steps(direction)[:4])[:2]

    def random_direction(self, names: Sequence[str] | None = None) -> Vector:
        """A direction in which every tensor moves by as much, relative to its own length."""
        direction = {}
        for name in self.parameters if names is None else names:
            value = self.parameters[name].detach()
            noise = torch.randn(value.shape, generator=self.generator, dtype=torch.float64).to(value)
            size = value.float().norm().item() or 1.0
            direction[name] = noise * (size / max(noise.float().norm().item(), 1e-30))
        for part in self.module.modules():
            # No gradient ever moves the row of an embedding's padding, though the logits may depend on it.
            if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.padding_idx is not None:
                for name in direction:
                    if self.parameters[name] is part.weight:
                        direction[name][part.padding_idx] = 0
        return direction

    def flat(self, vector: Vector) -> Tensor:
        """Its entries for all parameters, 0 for one that it lacks. ``[P]``."""
        parts = {**{name: torch.zeros_like(value) for name, value in self.parameters.items()}, **vector}
        return torch.cat([parts[name].detach().to_dense().flatten() for name in self.parameters])

    def _steps(self, direction: Vector) -> list[float]:
        """Factors of the direction at which differences are taken."""
        size = length({name: self.parameters[name].detach() for name in direction}) or 1.0
        radii = _RADII if self.logits.dtype == torch.float64 else _RADII_IN_SINGLE
        return [radius * size / max(length(direction), 1e-30) for radius in radii]

    def _at(self, direction: Vector, factor: float) -> Tensor:
        with self.restored():
            self._move(direction, factor)
            logits = self.run(grad=False)
            return logits.clone() if logits.dtype == torch.float64 else logits.float()

    def _move(self, direction: Vector, factor: float) -> None:
        for name, value in direction.items():
            self.parameters[name].data.add_(value, alpha=factor)


def relative(found: Tensor, expected: Tensor) -> float:
    """``||found - expected|| / ||expected||``, or 0 where both vanish."""
    found, expected = found.double().flatten(), expected.double().flatten()
    gap, size = (found - expected).norm().item(), expected.norm().item()
    tiny = torch.finfo(torch.float32).tiny
    return 0.0 if gap <= tiny else gap / max(size, tiny) if gap == gap else float("inf")


def inner(first: Vector, second: Vector) -> float:
    """``<first, second>`` over the names that both have."""
    return sum((first[name].double() * second[name].double()).sum().item() for name in first if name in second)


def length(direction: Vector) -> float:
    """Euclidean, over all tensors together."""
    return inner(direction, direction) ** 0.5


def _gap(tangent: Tensor, cotangent: Tensor, product: float) -> float:
    """``|<u, z> - product|``, relative to what such a product has for a random u."""
    u, z = cotangent.double(), tangent.double()
    found = (u * z).sum().item()
    typical = (u.norm() * z.norm()).item() / max(u.numel(), 1) ** 0.5
    gap = abs(found - product)
    if gap != gap:
        return float("inf")
    return gap / max(abs(product), typical, 1e-30) if gap > 1e-30 else 0.0


def _steadiest(at: Callable[[float], Tensor], steps: Sequence[float]) -> tuple[Tensor, float, float]:
    """The value that is nearest to both of its neighbors, the relative change to the further one, and its step.

    Too long a step bends, too short a one is rounding.
    """
    values: dict[float, Tensor] = {}
    best, error, best_step = torch.empty(0), float("inf"), steps[0]
    for step in steps:
        values[step] = at(step)
        tried = sorted(values)
        for below, middle, above in zip(tried, tried[1:], tried[2:], strict=False):
            change = max(relative(values[other], values[middle]) for other in (below, above))
            if change < error or not best.numel():
                best, error, best_step = values[middle], change, middle
        if error < _AGREEMENT:
            break
    return best, error, best_step
