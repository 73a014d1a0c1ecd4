"""Finds what autograd cannot see: a ``torch.autograd.Function`` that reads a parameter which is not its argument.

Inside of ``Function.forward`` nothing is recorded and no tangent moves. What it reads there beside its arguments, such
as the parameters of a block that a checkpoint of another library runs, has the derivative 0, without a word.
"""

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class HiddenReadError(NotImplementedError):
    """A derivative would be 0 by mistake."""


_APPLY = torch.autograd.Function.apply.__code__  # type: ignore[attr-defined]


class HiddenReads(TorchFunctionMode):
    """The mode in which a model runs while autograd records; raises where a Function reads one of the leaves unseen."""

    def __init__(self, leaves: list[Tensor]) -> None:
        super().__init__()
        self._leaves = {id(leaf) for leaf in leaves}

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
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
