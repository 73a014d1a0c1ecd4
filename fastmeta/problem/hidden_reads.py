"""Finds parameters that a derivative would miss.

There are two kinds. One the model reaches other than by its own attributes (a global list, a closure), where it stays
as it is while theta moves. The other a ``torch.autograd.Function`` reads, although it is not its argument: inside of
``Function.forward`` nothing is recorded and no tangent moves, so that what it reads there, such as the parameters of a
block that a checkpoint of another library runs, has the derivative 0, without a word.

Changes of parameters in place by ``theta.data``, which no version counter of theta tells, are found here, too.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode


class HiddenReadError(NotImplementedError):
    """A derivative would be 0 by mistake."""


_APPLY = torch.autograd.Function.apply.__code__  # type: ignore[attr-defined]


GET_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]


class DataChanges:
    """Finds changes of parameters in place by ``theta.data``."""

    def __init__(self) -> None:
        self._read: list[tuple[Tensor, int]] = []

    def run(self, function: Any, args: tuple[Any, ...]) -> Any:
        """Run ``GET_DATA``."""
        result = function(*args)
        if not result.is_inference():
            self._read.append((result, result._version))
        return result

    def check(self, parameters: Mapping[str, Tensor]) -> None:
        """Raise ValueError if the model has changed memory of these that it took by ``.data``."""
        changed = {_memory(data) for data, version in self._read if data._version != version}
        for name, parameter in parameters.items() if changed else ():
            if _memory(parameter) in changed:
                raise ValueError(
                    f"model must not change its parameters as it runs, but it changes {name} by its .data; do that "
                    "after optimizer.step(), or make it a parametrization (torch.nn.utils.parametrize)"
                )


class HiddenReads(TorchFunctionMode):
    """The mode in which a model runs while autograd records; raises where a Function reads one of the leaves unseen.

    Args:
        leaves: theta; those that require grad count.

    Attributes:
        changes: of parameters, by their ``.data``.
    """

    def __init__(self, leaves: list[Tensor]) -> None:
        super().__init__()
        self._leaves = {id(leaf) for leaf in leaves if leaf.requires_grad}
        self.changes = DataChanges()

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function == GET_DATA:
            return self.changes.run(function, args)
        result = function(*args, **kwargs)
        if not torch._C._is_fwd_grad_enabled() and has_tensor(result):
            refuse_hidden([tensor for tensor in tensors([*args, *kwargs.values()]) if id(tensor) in self._leaves])
        return result


def refuse_hidden(read: list[Tensor]) -> None:
    """Raise if one of these tensors, which move, is read inside of a Function that has not got it as an argument.

    Raises:
        HiddenReadError: so it is.
    """
    frame: FrameType | None = sys._getframe(1) if read else None
    while frame is not None:
        if frame.f_code is _APPLY:
            given = {_memory(argument) for argument in frame.f_locals["args"] if isinstance(argument, Tensor)}
            hidden = [tensor for tensor in read if _memory(tensor) not in given]
            if hidden:
                name, shape = frame.f_locals["cls"].__name__, list(hidden[0].shape)
                raise HiddenReadError(
                    f"the torch.autograd.Function {name} reads a tensor {shape} that depends on the parameters and "
                    "is not among its arguments, so that its derivative would be 0. Pass it as an argument; for "
                    "checkpointing use torch.utils.checkpoint.checkpoint(..., use_reentrant=False); or take "
                    "differences, with a gradient of your own: how='finite_difference', holdout_gradient=..."
                )
        frame = frame.f_back


def refuse_foreign(output: Tensor, parameters: Iterable[Tensor]) -> None:
    """Raise if a result depends on an ``nn.Parameter`` that is not among these; a walk over its graph.

    Raises:
        ValueError: so it is.
    """
    known = {id(parameter) for parameter in parameters}
    for node in _nodes(output):
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, nn.Parameter) and id(leaf) not in known:
            raise ValueError(
                f"model must read its parameters from its own attributes, but its output depends on one "
                f"{list(leaf.shape)} that it has from elsewhere (a closure, a global variable, an object that is no "
                "module, an attribute computed from a parameter before), where no derivative could move it; keep it as "
                "an nn.Parameter of a module inside of the model, and compute with it in forward"
            )


def refuse_cut_gradients(output: Tensor) -> None:
    """Have a backward pass raise where the backward of a Function cuts the graph of a second derivative.

    Autograd raises for ``once_differentiable`` only on the way to what the Function itself has read, and never for a
    backward under ``torch.no_grad`` or in NumPy.
    """
    for node in _nodes(output):
        if isinstance(node, BackwardCFunction):
            name = node._forward_cls.__name__  # type: ignore[attr-defined]
            node.register_hook(partial(_refuse_cut, name))


def _refuse_cut(name: str, gradients: tuple[Tensor | None, ...], arrived: tuple[Tensor | None, ...]) -> None:
    kept = [one for one in gradients if one is not None and one.requires_grad and one.grad_fn is not None]
    cut = not any(one.grad_fn.name() != "torch::autograd::Error" for one in kept if one.grad_fn is not None)
    if cut and torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in arrived):
        raise NotImplementedError(
            f"how='double_backward' and Hessian products differentiate twice, but the backward of the "
            f"torch.autograd.Function {name} can be differentiated only once (once_differentiable, torch.no_grad). "
            "Give it a jvp and use how='jvp', or use how='finite_difference'"
        )


def _nodes(output: Tensor) -> Iterator[Any]:
    """The graph that gave a tensor, node by node."""
    seen: set[Any] = set()
    left = [output.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            left += [following for following, _ in node.next_functions]


def _memory(tensor: Tensor) -> int:
    """The same for a tensor and its views."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)


def has_tensor(value: Any) -> bool:
    """Whether it is or holds a floating-point tensor: not a question such as ``x.shape`` or ``x.requires_grad``."""
    return any(tensor.is_floating_point() or tensor.is_complex() for tensor in tensors([value]))


def tensors(values: Any) -> Iterator[Tensor]:
    """The tensors among values and in their lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors(value)
