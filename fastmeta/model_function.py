"""A model as a pure function of its parameters: predictions, gradients, forward-mode derivatives, Hessian products.

Nothing of the model changes: every evaluation works on copies of its buffers, starts from the same random state (so
that dropout draws the same mask) and leaves parameters, ``.grad``, mode and random state as they were.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastmeta import checks
from fastmeta.capture import Outputs, capture_features, last_linear

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
Vector = dict[str, Tensor]
LossOfLogits = Callable[[Tensor], Tensor]  # [N, C] to a scalar


class Term(NamedTuple):
    """A loss on a batch, one summand of an objective."""

    inputs: Inputs
    loss: LossOfLogits
    curvature: Callable[[Tensor, Tensor], Tensor]  # logits and their tangent z [N, C] to (d2 loss / df2) z [N, C]


class ModelFunction:
    """``theta -> logits`` of a module.

    Args:
        model: the module; of a DistributedDataParallel or compiled one the module inside.
        mode: ``train`` or ``eval`` for the evaluations; None: as the model stands.
    """

    def __init__(self, model: nn.Module, *, mode: Literal["train", "eval"] | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.module = _unwrapped(model)
        self.parameters: Vector = {
            name: parameter.detach() for name, parameter in self.module.named_parameters() if parameter.requires_grad
        }
        if not self.parameters:
            raise ValueError(f"model must have parameters that require grad, got none in {type(model).__name__}")
        self._mode = mode
        self._random = torch.get_rng_state()

    def check(self, direction: object, argument: str = "direction") -> None:
        """Raise unless it is a direction of this model: a dict of tensors by parameter name."""
        if not isinstance(direction, Mapping) or not direction:
            raise TypeError(f"{argument} must be a dict of tensors by parameter name, got {type(direction).__name__}")
        for name, value in direction.items():
            if name not in self.parameters:
                raise ValueError(f"{argument} must name parameters that require grad, got {name!r}")
            entry = f"{argument}[{name!r}]"
            checks.shaped(value, entry, "the parameter's shape", self.parameters[name].shape)
            checks.like(self.parameters[name], "the parameter", **{entry: value})

    def last_layer_direction(self, direction: Vector) -> tuple[Tensor, Tensor | None]:
        """The direction's weight ``[C, D]`` and bias ``[C]`` of the last linear layer.

        Raises:
            ValueError: it moves other parameters, or not the weight.
        """
        layer, _ = last_linear(self.module)
        names = {
            name: name_of
            for name, value in self.module.named_parameters()
            for name_of in ("weight", "bias")
            if value is getattr(layer, name_of)
        }
        other = [name for name in direction if name not in names]
        if other:
            raise ValueError(f"direction must name the last layer's parameters ({', '.join(names)}), got {other[0]!r}")
        parts = {names[name]: value for name, value in direction.items()}
        weight = parts["weight"] if "weight" in parts else torch.zeros_like(layer.weight)
        return weight.detach(), parts.get("bias")

    def logits(
        self, inputs: Inputs, parameters: Vector | None = None, *, on_graph: bool = False, twice: bool = False
    ) -> Tensor:
        """``f(theta) [N, C]``, on the graph of ``parameters`` where they require grad.

        Args:
            inputs: of N examples.
            parameters: theta; None: the model's own.
            on_graph: on the graph of the model's own parameters, so that a backward pass reaches their ``.grad``.
            twice: with kernels that can be differentiated twice.
        """
        theta = {} if on_graph else self.parameters if parameters is None else parameters
        with torch.enable_grad() if on_graph else contextlib.nullcontext(), self._evaluation(twice=twice):
            return self._call(theta, inputs)

    def outputs(self, inputs: Inputs, *, on_graph: bool = False) -> Outputs:
        """Features and logits of the last linear layer at the model's own parameters."""
        with torch.set_grad_enabled(on_graph), self._evaluation(), capture_features(self.module) as tape:
            logits = self._call({}, inputs)
        return tape.outputs(logits)

    def gradient(
        self,
        inputs: Inputs,
        loss: LossOfLogits,
        parameters: Vector | None = None,
        names: Sequence[str] | None = None,
    ) -> tuple[Vector, Tensor]:
        """Gradient of ``loss(logits)`` at the parameters, and the logits ``[N, C]``, detached.

        Args:
            inputs: of N examples.
            loss: of the logits.
            parameters: theta; None: the model's own.
            names: the parameters that the gradient is taken by; None: all.
        """
        theta, leaves = self._leaves(parameters, names)
        with torch.enable_grad(), self._evaluation():
            logits = self._call(theta, inputs)
            value = loss(logits)
        return _gradient(value, leaves, create_graph=False), logits.detach()

    def gradient_at(self, logits: Tensor, loss: LossOfLogits) -> Vector:
        """Gradient of ``loss(logits)`` for logits on the graph of the model's own parameters, which is kept."""
        with torch.enable_grad():
            value = loss(logits)
        return _gradient(value, self._own(), create_graph=False, retain_graph=True)

    def jvp(
        self, inputs: Inputs, direction: Vector, parameters: Vector | None = None, *, on_graph: bool = False
    ) -> tuple[Tensor, Tensor]:
        """``f(theta)`` and ``D_v f(theta)`` in one pass of forward mode, both ``[N, C]``, the second without a graph.

        ``on_graph``: at the model's own parameters and with the first on their graph.
        """
        theta = self._own() if on_graph else self.parameters if parameters is None else parameters
        # Not torch.func.jvp: its dropout draws another mask than a plain pass where a tensor is not contiguous.
        with torch.set_grad_enabled(on_graph), self._evaluation(twice=True), forward_ad.dual_level():
            moving = {name: forward_ad.make_dual(theta[name], v) for name, v in direction.items()}
            logits, tangent = forward_ad.unpack_dual(self._call({**theta, **moving}, inputs))
        return logits, torch.zeros_like(logits) if tangent is None else tangent.detach()

    def hessian(
        self,
        terms: Sequence[Term],
        parameters: Vector | None = None,
        names: Sequence[str] | None = None,
        *,
        once: bool = False,
    ) -> Callable[[Vector], Vector]:
        """The product ``v -> (sum of the terms' Hessians) v``, by differentiating the gradient.

        Forward mode over the gradient takes as long as this and half as much memory again; reverse mode over a forward
        derivative is wrong for BatchNorm, whose forward derivative takes the batch statistics for constants.

        Args:
            terms: the summands.
            parameters: theta; None: the model's own.
            names: the parameters that move, in the direction and in the product; None: all.
            once: one product is wanted: the graph is given up on the way.
        """
        theta, leaves = self._leaves(parameters, names)
        with torch.enable_grad():
            values = []
            for term in terms:
                with self._evaluation(twice=True):
                    values.append(term.loss(self._call(theta, term.inputs)))
            gradient = _gradient(torch.stack(values).sum(), leaves, create_graph=True)

        def product(direction: Vector) -> Vector:
            on_graph = [name for name in direction if gradient[name].requires_grad]
            if not on_graph:
                return {name: torch.zeros_like(value) for name, value in leaves.items()}
            products = torch.autograd.grad(
                [gradient[name] for name in on_graph],
                list(leaves.values()),
                [direction[name] for name in on_graph],
                retain_graph=not once,
                allow_unused=True,
            )
            return _filled(products, leaves)

        return product

    def gauss_newton(
        self, terms: Sequence[Term], parameters: Vector | None = None, names: Sequence[str] | None = None
    ) -> Callable[[Vector], Vector]:
        """The product ``v -> (sum of J^T C J) v`` with ``J = df/dtheta`` and each term's curvature C of the logits.

        A pass of forward mode and one backward, on a graph that is built once and kept; see :meth:`hessian`.
        """
        theta, leaves = self._leaves(parameters, names)
        logits = []
        with torch.enable_grad():
            for term in terms:
                with self._evaluation(twice=True):
                    logits.append(self._call(theta, term.inputs))

        def product(direction: Vector) -> Vector:
            cotangents = []
            for term, here in zip(terms, logits, strict=True):
                _, tangent = self.jvp(term.inputs, direction, parameters)
                cotangents.append(term.curvature(here.detach(), tangent).to(here.dtype))
            with_graph = [place for place, here in enumerate(logits) if here.requires_grad]
            if not with_graph:
                return {name: torch.zeros_like(value) for name, value in leaves.items()}
            products = torch.autograd.grad(
                [logits[place] for place in with_graph],
                list(leaves.values()),
                [cotangents[place] for place in with_graph],
                retain_graph=True,
                allow_unused=True,
            )
            return _filled(products, leaves)

        return product

    def _leaves(self, parameters: Vector | None, names: Sequence[str] | None) -> tuple[Vector, Vector]:
        """Theta with leaves of autograd under the names, and these alone."""
        theta = self.parameters if parameters is None else parameters
        leaves = {name: theta[name].detach().requires_grad_() for name in (theta if names is None else names)}
        return {**theta, **leaves}, leaves

    def _own(self) -> Vector:
        """The parameters themselves, on whose graph a caller's backward pass reaches ``.grad``."""
        return {name: value for name, value in self.module.named_parameters() if name in self.parameters}

    def _call(self, parameters: Vector, inputs: Inputs) -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        positional: tuple[Any, ...] = ()
        keywords: dict[str, Any] = {}
        if isinstance(inputs, Mapping):
            keywords = dict(inputs)
        else:
            positional = inputs if isinstance(inputs, tuple) else (inputs,)
        return torch.func.functional_call(self.module, {**parameters, **buffers}, positional, keywords)

    @contextlib.contextmanager
    def _evaluation(self, *, twice: bool = False) -> Iterator[None]:
        """One evaluation; ``twice``: with kernels that can be differentiated twice or in forward mode."""
        before = torch.get_rng_state()
        modes = [(module, module.training) for module in self.module.modules()]
        fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.set_rng_state(self._random)
        try:
            if self._mode is not None:
                self.module.train(self._mode == "train")
            # A kernel of transformer layers in evaluation mode that has no derivative of any kind.
            torch.backends.mha.set_fastpath_enabled(False)
            with sdpa_kernel(SDPBackend.MATH) if twice else contextlib.nullcontext():
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            for module, training in modes:
                module.training = training
            torch.set_rng_state(before)


def batch_size(inputs: Inputs, name: str = "inputs") -> int:
    """N: the length of the first tensor."""
    values = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple) else (inputs,)
    for value in values:
        if isinstance(value, Tensor) and value.dim():
            return len(value)
    raise ValueError(f"{name} must contain a tensor [N, ...], got {type(inputs).__name__}")


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        name = "module" if isinstance(model, nn.parallel.DistributedDataParallel) else "_orig_mod"
        inner = getattr(model, name, None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _gradient(value: Tensor, theta: Vector, create_graph: bool, retain_graph: bool | None = None) -> Vector:
    grads = torch.autograd.grad(
        value, list(theta.values()), create_graph=create_graph, retain_graph=retain_graph, allow_unused=True
    )
    return _filled(grads, theta)


def _filled(grads: Sequence[Tensor | None], theta: Vector) -> Vector:
    pairs = zip(theta.items(), grads, strict=True)
    return {name: torch.zeros_like(value) if grad is None else grad for (name, value), grad in pairs}
