"""Checks of arguments: one error that names the argument, what was expected and what came.

``csrc/checks.h`` makes the same checks for the kernels, so on the fast path these run only to word the error.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from fastmeta.losses import LOSSES, Loss

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IGNORED = -100  # ignore_index of torch.nn.functional.cross_entropy
_SHAPES = {1: "1-D [N]", 2: "2-D [N, C]"}
Result = TypeVar("Result")


def floating(tensor: object, name: str) -> Tensor:
    """A floating tensor of one of the four supported dtypes."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {_name(tensor.dtype)}")
    return tensor


def matrix(tensor: object, name: str, symbols: str) -> Tensor:
    """A floating 2-D tensor; ``symbols`` names its dimensions, ``"[N, D]"``."""
    checked = floating(tensor, name)
    if checked.dim() != 2:
        raise ValueError(f"{name} must be 2-D {symbols}, got {checked.dim()}-D {list(checked.shape)}")
    return checked


def shaped(tensor: object, name: str, symbols: str, shape: Sequence[int]) -> Tensor:
    """A floating tensor of exactly this shape."""
    checked = floating(tensor, name)
    if tuple(checked.shape) != tuple(shape):
        raise ValueError(f"{name} must be {symbols} = {list(shape)}, got {list(checked.shape)}")
    return checked


def like(first: Tensor, first_name: str, **others: Tensor | None) -> None:
    """Every other tensor has the first one's dtype and device."""
    for name, other in others.items():
        if other is None:
            continue
        if other.device != first.device:
            raise ValueError(f"{name} must be on {first.device} like {first_name}, got {other.device}")
        if other.dtype != first.dtype:
            raise TypeError(f"{name} must be {_name(first.dtype)} like {first_name}, got {_name(other.dtype)}")


def targets(
    tensor: object, features: Tensor, num_classes: int, name: str = "targets", *, ignored: bool = False
) -> Tensor:
    """``[N, C]`` probabilities in the features' dtype, or ``[N]`` int64 classes in range (checked on the CPU only).

    ``ignored``: a class may also be -100.
    """
    count = features.shape[0]
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype == torch.int64:
        if tuple(tensor.shape) != (count,):
            one_hot = tuple(tensor.shape) == (count, num_classes)
            hint = f"; as probabilities [N, C]: {name}.to(logits.dtype)" if one_hot else ""
            raise ValueError(f"{name} of int64 classes must be [N] = [{count}], got {list(tensor.shape)}{hint}")
        if tensor.device != features.device:
            raise ValueError(f"{name} must be on {features.device} like features, got {tensor.device}")
        # On a GPU the check would wait for the device.
        if tensor.is_cpu and count and not torch.compiler.is_compiling():
            low, high = int(tensor.min()), int(tensor.max())
            if ignored and low == IGNORED:
                classes = tensor[tensor != IGNORED]
                low, high = (int(classes.min()), high) if len(classes) else (0, 0)
            if low < 0 or high >= num_classes:
                hint = f"; use {name}.to(logits.dtype).view(-1, 1) for one output" if num_classes == 1 else ""
                wrong = low if low < 0 else high
                raise ValueError(f"{name} must be classes in [0, {num_classes}), got {wrong}{hint}")
        return tensor
    target_kind(tensor, name)
    if tensor.dim() == 1 and len(tensor) == count:
        hint = f"{name}.unsqueeze(1)" if num_classes == 1 else f"{name}.long() if they are classes"
        raise ValueError(f"{name} must be [N, C] = [{count}, {num_classes}], got {list(tensor.shape)}; use {hint}")
    shaped(tensor, name, "[N, C]", (count, num_classes))
    like(features, "features", **{name: tensor})
    return tensor


def classes_of(tensor: Tensor, num_classes: int, loss: Loss, name: str = "targets") -> None:
    """Not int64 classes for one output, whose labels 0 and 1 they would not be.

    The softmax of one output is 1 whatever the model does. The operators themselves take class k for the row with a 1
    at k, whatever the loss.
    """
    if tensor.dtype == torch.int64 and num_classes == 1:
        if loss.has_softmax:
            raise ValueError(
                f"{name} are classes of one output, whose softmax is always 1: use the loss binary_cross_entropy with "
                f"{name}.to(logits.dtype).view(-1, 1)"
            )
        raise ValueError(
            f"{name} must be floating [N, 1] for one output, got int64 classes {list(tensor.shape)}; "
            f"use {name}.to(logits.dtype).view(-1, 1)"
        )


def target_kind(tensor: object, name: str) -> Tensor:
    """Floating, or int64."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype != torch.int64 and not tensor.is_floating_point():
        hint = ""
        if tensor.dtype == torch.bool:
            hint = f"; as probabilities: {name}.float()"
        elif not tensor.is_complex():
            hint = f"; as classes: {name}.long()"
        raise TypeError(f"{name} must be [N, C] probabilities or [N] int64 classes, got {_name(tensor.dtype)}{hint}")
    return tensor


def loss_code(loss: object, name: str = "loss") -> int:
    """The kernels' number of a loss."""
    code = LOSSES.get(loss) if isinstance(loss, str) else None
    if code is None:
        raise ValueError(f"{name} must be one of {', '.join(LOSSES)}, got {loss!r}")
    return code


def choice(value: object, name: str, *allowed: str) -> None:
    """One of the names."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def preset(presets: Mapping[str, Result], name: str, method: str) -> Result:
    """The published settings of this name."""
    if name not in presets:
        raise ValueError(f"{method} has the presets {', '.join(presets)}, got {name!r}")
    return presets[name]


def number(value: object, name: str, *, low: float | None = None, high: float | None = None) -> float:
    """A finite number within ``[low, high]``."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    checked = float(value)
    if not math.isfinite(checked):
        raise ValueError(f"{name} must be finite, got {value}")
    if (low is not None and checked < low) or (high is not None and checked > high):
        bounds = f">= {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be {bounds}, got {value}")
    return checked


def run(kernel: Callable[..., Result], arguments: tuple[Any, ...], check: Callable[[], None]) -> Result:
    """Run a kernel; if it refuses its arguments, let the Python check word the error."""
    if torch.compiler.is_compiling():
        check()
        return kernel(*arguments)
    try:
        return kernel(*arguments)
    except Exception as error:
        _explain(error, check)


def _explain(error: Exception, check: Callable[[], None]) -> NoReturn:
    try:
        check()
    except (TypeError, ValueError) as worded:
        raise worded from None
    raise error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
