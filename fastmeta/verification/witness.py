"""What a model's derivatives are, by plain PyTorch and none of the package's own evaluations.

Two witnesses that have nothing in common: the user's own backward pass, and differences of the forward pass.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmeta import checks
from fastmeta.problem.direction import Vector
from fastmeta.problem.model_logits import logits_of
from fastmeta.problem.targets import as_rows
from fastmeta.verification.state import State

# Of differences, relative to the length of the parameters; more are tried where the first three do not agree.
_RADII = (1e-4, 1e-5, 1e-6, 1e-7, 1e-2, 1e-3)
_RADII_IN_SINGLE = (1e-2, 3e-3, 1e-3, 3e-4, 3e-2)
_AGREEMENT = 1e-4


class Differences(NamedTuple):
    """A derivative by central differences, of the radius at which it depends least on the radius."""

    value: Tensor
    error: float  # the change to the next radius, relative to the value
    kink: float = 0.0  # the difference of the slopes to both sides: what a step over a kink leaves


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
        self._backward = backward
        self.state = State(module, inputs)
        named = dict(module.named_parameters())
        self.parameters: Vector = {name: value for name, value in named.items() if value.requires_grad}
        self._given = targets
        self.changes_by_forward: list[str] = []
        self.others_with_gradient: list[str] = []  # tensors that a backward pass reaches beside the parameters
        self.logits = self.forward()  # [N, C]
        self.again = self.forward()

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """After the block everything is as it was."""
        try:
            yield
        finally:
            self.state.restore()

    def forward(self) -> Tensor:
        """The logits ``[N, C]`` of one pass, detached.

        With a graph, as a training step has it: TorchScript keeps what it has seen in its first passes.
        """
        with self.restored():
            with torch.enable_grad():
                logits = self.call().detach()
            self.changes_by_forward = self.state.touched()
        return logits

    def call(self) -> Tensor:
        """One call of the model. ``[N, C]``."""
        with torch.compiler.set_stance("force_eager"):
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
        return functional.cross_entropy(logits, self.targets.to(logits) if self.is_soft else self.targets)

    @property
    def targets(self) -> Tensor:
        """Given, or predicted, as are those of class -100. ``[N]`` or ``[N, C]``."""
        predicted = self.logits.argmax(1)
        if self._given is None:
            return predicted
        given = as_rows(self._given, len(predicted))
        return given if given.is_floating_point() else torch.where(given == checks.IGNORED, predicted, given)

    @property
    def is_soft(self) -> bool:
        """Whether the targets are ``[N, C]``."""
        return self.targets.is_floating_point()

    def cotangent(self) -> Tensor:
        """Gradient of the loss by the logits. ``[N, C]``."""
        logits = self.logits.clone().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(self.loss(logits), logits)[0]

    def pulled_back(self, cotangent: Tensor | None, shift: Vector | None = None, factor: float = 0.0) -> Vector:
        """``J^T u`` by the user's own backward, without those that it does not reach; None: the loss's gradient.

        Args:
            cotangent: u ``[N, C]``.
            shift: v, for the gradient at ``theta + factor v``.
            factor: of the shift.
        """
        with self.restored():
            self._move(shift or {}, factor)
            with torch.enable_grad():
                logits = self.call()
                value = self.loss(logits) if cotangent is None else (logits * cotangent).sum()
            return self.gradient_of(value)

    def gradient_of(self, value: Tensor) -> Vector:
        """Gradient of a scalar by the parameters, without those that it does not reach; ``.grad`` is put back later.

        Where ``.backward()`` may be called it is, because autograd.grad sees less: nothing inside of reentrant
        checkpoints, and nothing that a Function's backward passes on by itself.
        """
        own = list(self.parameters.values())
        if not self._backward:
            found: Sequence[Tensor | None] = torch.autograd.grad(value, own, allow_unused=True)
        else:
            before = [parameter.grad for parameter in own]
            try:
                for parameter in own:
                    parameter.grad = None
                value.backward()
                found = tuple(parameter.grad for parameter in own)
            finally:
                for parameter, gradient in zip(own, before, strict=True):
                    parameter.grad = gradient
            self.others_with_gradient = [name for name, _ in self.state.with_new_gradient()]
        return {name: dense(g) for name, g in zip(self.parameters, found, strict=True) if g is not None}

    def graph(self) -> Graph:
        """What is behind the logits of one pass."""
        with self.restored():
            with torch.enable_grad():
                logits = self.call()
            return _graph_of(logits)

    def difference(self, direction: Vector, step: float, *, one_sided: bool = False) -> Tensor:
        """``(f(theta + step v) - f(theta - step v)) / 2 step``, or to one side. ``[N, C]``."""
        plus = self._at(direction, step)
        return (plus - self._at(direction, 0.0 if one_sided else -step)) / (step if one_sided else 2 * step)

    def differences(self, direction: Vector) -> Differences:
        """``D_v f`` by differences of many radii."""
        here = self._at(direction, 0.0)
        sides: dict[float, tuple[Tensor, Tensor]] = {}

        def central(step: float) -> Tensor:
            sides[step] = self._at(direction, step), self._at(direction, -step)
            return (sides[step][0] - sides[step][1]) / (2 * step)

        found, step = _steadiest(central, self.steps(direction))
        plus, minus = sides[step]
        return found._replace(kink=relative(plus - here, here - minus))

    def hessian_product(self, direction: Vector) -> Differences:
        """``H v`` of the loss by differences of the user's own gradients, flat. ``[P]``."""

        def gradient(factor: float) -> Tensor:
            found = self.pulled_back(None, direction, factor)
            return torch.cat([found.get(name, torch.zeros_like(p)).flatten() for name, p in self.parameters.items()])

        return _steadiest(lambda step: (gradient(step) - gradient(-step)) / (2 * step), self.steps(direction)[:4])[0]

    def random_direction(self, generator: torch.Generator, names: list[str] | None = None) -> Vector:
        """A direction in which every tensor moves by as much, relative to its own length."""
        direction = {}
        for name in self.parameters if names is None else names:
            value = self.parameters[name].detach()
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
            size = value.float().norm().item() or 1.0
            direction[name] = noise * (size / max(noise.float().norm().item(), 1e-30))
        for part in self.module.modules():
            # No gradient ever moves the row of an embedding's padding, though the logits may depend on it.
            if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.padding_idx is not None:
                for name, value in self.parameters.items():
                    if value is part.weight and name in direction:
                        direction[name][part.padding_idx] = 0
        return direction

    def steps(self, direction: Vector) -> list[float]:
        """Factors of the direction at which differences are taken."""
        size = length({name: self.parameters[name].detach() for name in direction}) or 1.0
        radii = _RADII if self.logits.dtype == torch.float64 else _RADII_IN_SINGLE
        return [radius * size / max(length(direction), 1e-30) for radius in radii]

    def _at(self, direction: Vector, factor: float) -> Tensor:
        with self.restored(), torch.no_grad():
            self._move(direction, factor)
            logits = self.call()
            return logits.clone() if logits.dtype == torch.float64 else logits.float()

    def _move(self, direction: Vector, factor: float) -> None:
        for name, value in direction.items():
            self.parameters[name].data.add_(value, alpha=factor)


def relative(found: Tensor, expected: Tensor) -> float:
    """``||found - expected|| / ||expected||``, or 0 where both vanish."""
    found, expected = found.double().flatten(), expected.double().flatten()
    gap, length = (found - expected).norm().item(), expected.norm().item()
    tiny = torch.finfo(torch.float32).tiny
    return 0.0 if gap <= tiny else gap / max(length, tiny) if gap == gap else float("inf")


def dense(gradient: Tensor) -> Tensor:
    """A copy, detached; of a sparse one with its zeros."""
    gradient = gradient.detach()
    return gradient.clone() if gradient.layout == torch.strided else gradient.to_dense()


def inner(first: Vector, second: Vector) -> float:
    """``<first, second>`` over the names that both have."""
    return sum((first[name].double() * second[name].double()).sum().item() for name in first if name in second)


def length(direction: Vector) -> float:
    """Euclidean, over all tensors together."""
    return sum(value.double().square().sum().item() for value in direction.values()) ** 0.5


def _steadiest(at: Callable[[float], Tensor], steps: Sequence[float]) -> tuple[Differences, float]:
    """The value that is nearest to both of its neighbors, and its step.

    Too long a step bends, too short a one is rounding.
    """
    values: dict[float, Tensor] = {}
    best, best_step = Differences(torch.empty(0), float("inf")), steps[0]
    for step in steps:
        values[step] = at(step)
        tried = sorted(values)
        for below, middle, above in zip(tried, tried[1:], tried[2:], strict=False):
            error = max(relative(values[other], values[middle]) for other in (below, above))
            if error < best.error or not best.value.numel():
                best, best_step = Differences(values[middle], error), middle
        if best.error < _AGREEMENT:
            break
    return best, best_step


def _graph_of(logits: Tensor) -> Graph:
    todo: list[Any] = [logits.grad_fn]
    seen: set[Any] = set()
    leaves: list[Tensor] = []
    functions: set[str] = set()
    scripted = False
    if logits.is_leaf and logits.requires_grad:
        leaves.append(logits)
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            functions.add(type(node).__name__.removesuffix("Backward"))
        scripted |= "jit" in node.name() or "DifferentiableGraph" in node.name()
        todo += [parent for parent, _ in node.next_functions]
    return Graph(leaves, sorted(functions), scripted)
