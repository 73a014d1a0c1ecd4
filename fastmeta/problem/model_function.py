"""A model as a pure function of its parameters: predictions, gradients, forward-mode derivatives, Hessian products.

Nothing of the model changes: every evaluation works on copies of its inputs and buffers, starts from the same random
state (so that dropout draws the same mask) and leaves parameters, ``.grad``, mode, attributes and random state as they
were.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.parameter import is_lazy

from fastmeta import checks
from fastmeta.capture import Outputs, capture_features, last_linear
from fastmeta.ops.process_group import Group, sum_over
from fastmeta.problem import vectors
from fastmeta.problem.direction import Vector
from fastmeta.problem.evaluation import Evaluator, Mode
from fastmeta.problem.forward_mode import ForwardMode
from fastmeta.problem.hidden_reads import HiddenReadError, HiddenReads, refuse_cut_gradients, refuse_foreign
from fastmeta.problem.input_copies import InputCopies
from fastmeta.problem.model_logits import logits_of
from fastmeta.problem.sharded import refuse_sharded

# Arguments of the model: an exact tuple's are positional, a mapping's are by name, anything else is one argument.
Inputs = Any
LossOfLogits = Callable[[Tensor], Tensor]  # [N, C] to a scalar


class Term(NamedTuple):
    """A loss on a batch, one summand of an objective."""

    inputs: Inputs
    loss: LossOfLogits
    # Logits and their tangent z [N, C] to (d2 loss / df2) z [N, C]; a Gauss-Newton product needs it.
    curvature: Callable[[Tensor, Tensor], Tensor] | None = None


class ModelFunction:
    """``theta -> logits`` of a module as it would run next.

    It runs in the module's mode, from its buffers as they are and from the random state at the time this object is
    made. Wrappers (DistributedDataParallel, DataParallel, torch.compile) are taken off, and compiled parts run
    uncompiled, TorchScript unoptimized, reentrant checkpoints as non-reentrant ones. Forward hooks run in every
    evaluation. Attributes of modules and the random states of torch, Python, NumPy and of generators among these
    attributes are put back; what a model changes in global variables, closures and objects of other classes is not.

    Args:
        model: the module; it gives logits ``[N, C]``, or ``[B, T, C]``, whose N = B T rows are those of its tokens; by
            themselves, in an object or dict as ``logits``, or as the only such tensor of a tuple.
        mode: ``train`` or ``eval`` for the evaluations; None: as the model stands.

    Raises:
        TypeError: not a module, or one of TorchScript.
        ValueError: no parameter requires grad, one is not initialized yet or sharded, or the model changes one as it
            runs; or a tensor among the attributes requires grad and is no parameter.
    """

    sharded = False
    """whether ``parameters`` are this process's parts of them"""

    def __init__(self, model: nn.Module, *, mode: Mode | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self._given = model
        self.module = _unwrapped(model)
        if isinstance(self.module, torch.jit.ScriptModule):
            raise TypeError(f"model must be a module in Python, got {type(model).__name__}")
        own = dict(self.module.named_parameters())
        lazy = [name for name, parameter in own.items() if is_lazy(parameter)]
        if lazy:
            raise ValueError(f"model must be initialized, but {lazy[0]} is lazy; run the model once before")
        self._check_parts()
        self._own: Vector = {name: parameter for name, parameter in own.items() if parameter.requires_grad}
        if not self._own:
            raise ValueError(f"model must have parameters that require grad, got none in {type(model).__name__}")
        with torch.inference_mode(False):
            self.parameters: Vector = {name: self._part(parameter) for name, parameter in self._own.items()}
        self._evaluator = Evaluator(self.module, mode)

    def _check_parts(self) -> None:
        refuse_sharded(self.module)

    def _part(self, parameter: Tensor) -> Tensor:
        return parameter.detach()

    def joined(self, gradient: Vector, group: Group) -> Vector:
        """The sum of the gradients of all processes."""
        return dict(zip(gradient, sum_over(list(gradient.values()), group), strict=True))

    def norm(self, direction: Vector) -> Tensor:
        """Euclidean length of a direction; see :func:`fastmeta.problem.vectors.norm`."""
        return vectors.norm(direction)

    def check(self, direction: object, argument: str = "direction") -> Vector:
        """A direction of this model, detached: a dict of tensors by parameter name, without the entries that are None.

        A tied parameter goes by any of its names, a wrapped model's parameter by its name with or without the prefix.

        Raises:
            TypeError: not such a dict, or an entry's dtype is not the parameter's.
            ValueError: a name, shape or device is not the parameter's.
        """
        if not isinstance(direction, Mapping):
            raise TypeError(f"{argument} must be a dict of tensors by parameter name, got {type(direction).__name__}")
        entries = {name: value for name, value in direction.items() if value is not None}
        if not entries:
            got = "None for every name" if direction else "an empty one"
            raise TypeError(f"{argument} must be a dict of tensors by parameter name, got {got}")
        checked: Vector = {}
        for given, value in entries.items():
            name = given if given in self.parameters else self._name_of(given, argument)
            if name in checked:
                raise ValueError(f"{argument} must name a parameter once, got {given!r}, which is also {name!r}")
            entry = f"{argument}[{given!r}]"
            checks.shaped(value, entry, "the parameter's shape", self.parameters[name].shape)
            checks.like(self.parameters[name], "the parameter", **{entry: value})
            checked[name] = value.detach() if value.layout == torch.strided else value.detach().to_dense()
        return checked

    def check_gradient(self, gradient: object, argument: str) -> Vector:
        """A gradient by the model's parameters, all of them and in their order; see :meth:`check`.

        An entry that is missing or None is 0: autograd leaves ``p.grad`` at None where the loss does not reach p.
        """
        checked = self.check(gradient, argument)
        return {name: checked[name] if name in checked else torch.zeros_like(p) for name, p in self.parameters.items()}

    def _name_of(self, given: object, argument: str) -> str:
        """The name in ``self.parameters`` of a parameter that is given by another of its names."""
        everything = {
            name: parameter
            for model in (self.module, self._given)
            for name, parameter in model.named_parameters(remove_duplicate=False)
        }
        if given not in everything:
            raise ValueError(f"{argument} must name parameters of {type(self.module).__name__}, got {given!r}")
        parameter = everything[given]  # type: ignore[index]
        if not parameter.requires_grad:
            raise ValueError(f"{argument} must name parameters that require grad, got {given!r}, which is frozen")
        return next(name for name, own in self._own.items() if own is parameter)

    def last_layer_direction(self, direction: Vector) -> tuple[Tensor, Tensor | None]:
        """The direction's weight ``[C, D]`` and bias ``[C]`` of the last linear layer.

        Raises:
            ValueError: it moves other parameters, or the weight is tied to another layer's.
        """
        layer = self._last_layer()
        names = {
            name: name_of
            for name, value in self._own.items()
            for name_of in ("weight", "bias")
            if value is layer._parameters.get(name_of)
        }
        other = [name for name in direction if name not in names]
        if other:
            raise ValueError(f"direction must name the last layer's parameters ({', '.join(names)}), got {other[0]!r}")
        parts = {names[name]: value for name, value in direction.items()}
        if "weight" not in parts:
            parts["weight"] = parts["bias"].new_zeros(layer.out_features, layer.in_features)
        return parts["weight"].detach(), parts.get("bias")

    def _last_layer(self) -> nn.Linear:
        layer, description = last_linear(self.module)
        # Of a parametrized layer the weight is no parameter, and reading it could move its state.
        weight = layer._parameters.get("weight")
        uses = [part for part in self.module.modules() if any(p is weight for p in part._parameters.values())]
        if weight is not None and len(uses) > 1:
            raise ValueError(f"how='last_layer' cannot move {description}: its weight is tied to another layer's")
        return layer

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
        theta = self._own if on_graph else self.parameters if parameters is None else parameters
        with torch.enable_grad() if on_graph else contextlib.nullcontext():
            return self._call(theta, inputs, derivative=twice, on_graph=on_graph)

    def outputs(self, inputs: Inputs, *, on_graph: bool = False) -> Outputs:
        """Features and logits of the last linear layer at the model's own parameters.

        Runs once more, on the graph, where values alone do not show the rows: equal logits of different features, as
        of a head that starts at zero, or something constant added to them.

        Raises:
            ValueError: the layer does not move, or not by itself, computes something else, or more than the logits.
            RuntimeError: its outputs are not the logits.
        """
        self._last_layer()
        with torch.set_grad_enabled(on_graph), capture_features(self.module) as tape:
            logits = self._call(self._own, inputs, on_graph=on_graph)
        if len(tape.calls) > 1 and sum(output[..., 0].numel() for _, output in tape.calls) > len(logits):
            raise ValueError(
                "how='last_layer' needs a last layer that gives the logits alone, but this one runs "
                f"{len(tape.calls)} times, and what else it gives moves with it; use how='jvp'"
            )
        try:
            return tape.outputs(logits)
        except RuntimeError:
            if on_graph:
                raise
        outputs = self.outputs(inputs, on_graph=True)
        return outputs._replace(logits=outputs.logits.detach())

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
            names: the parameters to differentiate by; None: all.
        """
        theta, leaves = self._leaves(parameters, names)
        with torch.enable_grad():
            logits = self._call(theta, inputs)
            value = loss(logits)
        return self.differentiated([value], theta, leaves), logits.detach()

    def gradient_at(self, logits: Tensor, loss: LossOfLogits) -> Vector:
        """Gradient of ``loss(logits)`` for logits on the graph of the model's own parameters; the graph is kept."""
        with torch.enable_grad():
            value = loss(logits)
        return self.differentiated([value], self._own, self._own, retain_graph=True)

    def differentiated(
        self,
        values: Sequence[Tensor],
        theta: Vector,
        by: Vector,
        cotangents: Sequence[Tensor] | None = None,
        *,
        create_graph: bool = False,
        retain_graph: bool | None = None,
    ) -> Vector:
        """Gradient of the sum of ``values``, computed at theta, by the tensors ``by``; 0 for one that has no effect.

        The module has the parameters theta meanwhile: activation checkpointing runs it again in the backward pass.
        """
        on_graph = [place for place, value in enumerate(values) if value.requires_grad]
        if not on_graph:
            return {name: torch.zeros_like(value) for name, value in by.items()}
        with self._evaluator.evaluation(theta, derivative=create_graph), torch.set_grad_enabled(create_graph):
            grads = torch.autograd.grad(
                [values[place] for place in on_graph],
                list(by.values()),
                None if cotangents is None else [cotangents[place] for place in on_graph],
                create_graph=create_graph,
                retain_graph=retain_graph,
                materialize_grads=True,
            )
            dense = [grad if grad.layout == torch.strided else grad.to_dense() for grad in grads]
        return dict(zip(by, dense, strict=True))

    def jvp(
        self, inputs: Inputs, direction: Vector, parameters: Vector | None = None, *, on_graph: bool = False
    ) -> tuple[Tensor, Tensor]:
        """``f(theta)`` and ``D_v f(theta)`` in one pass of forward mode, both ``[N, C]``, the second without a graph.

        ``on_graph``: at the model's own parameters, with the logits on their graph. Where the model has checkpointed
        blocks, these logits come from a second pass, without tangents, which the backward pass can recompute.
        """
        theta = self._own if on_graph else self.parameters if parameters is None else parameters
        # Not torch.func.jvp: its dropout draws another mask than a plain pass where a tensor is not contiguous.
        # Gradients are enabled only so that ForwardMode sees where the model itself is in torch.no_grad.
        if on_graph and self._evaluator.has_backward_hooks():  # they have no forward mode, and only a graph has them
            return self.logits(inputs, on_graph=True), self.jvp(inputs, direction, parameters)[1]
        mode = ForwardMode()
        with torch.enable_grad(), forward_ad.dual_level():
            moving = {name: forward_ad.make_dual(theta[name], v) for name, v in direction.items()}
            try:
                dual = self._call({**theta, **moving}, inputs, derivative=True, on_graph=on_graph, inside=mode)
            except HiddenReadError:
                raise
            except NotImplementedError as error:
                raise NotImplementedError(
                    "how='jvp' needs forward mode in every part of the model, use how='double_backward' or "
                    f"how='finite_difference'; {str(error).splitlines()[0]}"
                ) from error
            logits, tangent = forward_ad.unpack_dual(dual)
        if on_graph and mode.saw_hooks:
            logits = self.logits(inputs, on_graph=True)
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
            once: the product is called once only, which frees the graph.
        """
        theta, leaves = self._leaves(parameters, names)
        with torch.enable_grad():
            values = [term.loss(self._call(theta, term.inputs, derivative=True)) for term in terms]
            gradient = self.differentiated(values, theta, leaves, create_graph=True)

        def product(direction: Vector) -> Vector:
            along = [gradient[name] for name in direction]
            return self.differentiated(along, theta, leaves, list(direction.values()), retain_graph=not once)

        return product

    def gauss_newton(
        self, terms: Sequence[Term], parameters: Vector | None = None, names: Sequence[str] | None = None
    ) -> Callable[[Vector], Vector]:
        """The product ``v -> (sum of J^T C J) v`` with ``J = df/dtheta`` and each term's curvature C of the logits.

        A pass of forward mode and one backward, on a graph that is built once and kept; see :meth:`hessian`.
        """
        theta, leaves = self._leaves(parameters, names)
        with torch.enable_grad():
            logits = [self._call(theta, term.inputs) for term in terms]

        def product(direction: Vector) -> Vector:
            cotangents = []
            for term, here in zip(terms, logits, strict=True):
                assert term.curvature is not None, "of a Gauss-Newton product"
                try:
                    _, tangent = self.jvp(term.inputs, direction, parameters)
                except NotImplementedError as error:
                    raise NotImplementedError(
                        "curvature='gauss_newton' needs forward mode in every part of the model, use "
                        f"curvature='hessian'; {str(error.__cause__).splitlines()[0]}"
                    ) from error
                cotangents.append(term.curvature(here.detach(), tangent).to(here.dtype))
            return self.differentiated(logits, theta, leaves, cotangents, retain_graph=True)

        return product

    def _leaves(self, parameters: Vector | None, names: Sequence[str] | None) -> tuple[Vector, Vector]:
        """Theta with new autograd leaves under the names, and the leaves alone."""
        theta = self.parameters if parameters is None else parameters
        leaves = {name: theta[name].detach().requires_grad_() for name in (theta if names is None else names)}
        return {**theta, **leaves}, leaves

    def _call(
        self,
        parameters: Vector,
        inputs: Inputs,
        *,
        derivative: bool = False,
        on_graph: bool = False,
        inside: ForwardMode | None = None,
    ) -> Tensor:
        """Logits ``[N, C]`` at the parameters; ``on_graph``: the inputs are not detached."""
        copied = InputCopies(on_graph=on_graph)
        positional, keywords = arguments_of(inputs, copied)
        mode: ForwardMode | HiddenReads | None = inside
        if mode is None and torch.is_grad_enabled():
            mode = HiddenReads(list(parameters.values()))
        with self._evaluator.evaluation(parameters, derivative=derivative, on_graph=on_graph):
            with mode or contextlib.nullcontext():
                output = self.module(*positional, **keywords)
            logits = logits_of(output)
        if mode is not None:
            mode.changes.check({**self._evaluator.frozen, **parameters})
        copied.check_unchanged()
        if logits.requires_grad and not on_graph:
            refuse_foreign(logits, parameters.values())
            if derivative:
                refuse_cut_gradients(logits)
        return logits


def arguments_of(inputs: Inputs, copied: InputCopies) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copies of the model's arguments, by position and by name."""
    if not isinstance(inputs, Mapping):
        return tuple(map(copied, inputs if type(inputs) is tuple else (inputs,))), {}
    for name in inputs:
        if not isinstance(name, str):
            raise TypeError(f"inputs must be a mapping of keyword arguments by name, got the name {name!r}")
    return (), {name: copied(value) for name, value in inputs.items()}


def _unwrapped(model: nn.Module) -> nn.Module:
    parallel = nn.parallel.DistributedDataParallel, nn.DataParallel
    while True:
        name = "module" if isinstance(model, parallel) else "_orig_mod"
        inner = getattr(model, name, None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner
