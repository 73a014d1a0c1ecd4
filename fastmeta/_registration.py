"""Fake kernels, and what differentiation does at the registered operators.

PyTorch lets forward-mode tangents pass through a registered operator as zeros, without an error. The guard below, on
the Autograd key of every operator, raises instead; a backward through one raises when it is reached.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastmeta import _extension, _kernels

_AFTER_AUTOGRAD = torch._C._after_autograd_keyset
# The library object holds the registrations; they go when it is collected.
_LIBRARY = torch.library.Library("fastmeta", "IMPL")


def _tensors(arguments: tuple[Any, ...]) -> list[Tensor]:
    found: list[Tensor] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            found.append(argument)
        elif isinstance(argument, list | tuple):
            found.extend(item for item in argument if isinstance(item, Tensor))
    return found


_NO_BACKWARD = (
    "the kernel of fastmeta::{} is not differentiable; call fastmeta.ops with impl=None for the differentiable "
    "reference, or detach its inputs"
)
_NO_FORWARD = (
    "fastmeta::{} has no forward-mode derivative; call fastmeta.ops with impl=None for the differentiable reference"
)


class _NotDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, call: Callable[..., Any], arguments: tuple[Any, ...], *tensors: Tensor) -> Any:
        ctx.name = name
        return call(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(_NO_BACKWARD.format(ctx.name))


def _guard(name: str, mutates: bool) -> Callable[..., Any]:
    operator = getattr(torch.ops.fastmeta, name).default

    def guarded(keys: Any, *arguments: Any) -> Any:
        tensors = _tensors(arguments)
        if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            raise RuntimeError(_NO_FORWARD.format(name))

        def below(*values: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return operator.redispatch(keys & _AFTER_AUTOGRAD, *values)

        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            if mutates:
                raise RuntimeError(f"fastmeta::{name} works in place and is not differentiable; use torch.no_grad()")
            if torch._C._are_functorch_transforms_active():  # torch.func.grad and its kin differentiate at once
                raise RuntimeError(_NO_BACKWARD.format(name))
            return _NotDifferentiable.apply(name, below, arguments, *tensors)
        return below(*arguments)

    return guarded


def _head_outputs(logits: Tensor | None, head_weight: Tensor | None) -> int:
    if head_weight is not None:
        return head_weight.shape[0]
    assert logits is not None, "the kernels' own check"
    return logits.shape[1]


def _last_layer_gradient(
    features: Tensor, logits: Any, head_weight: Any, head_bias: Any, targets: Any, weights: Any, loss: int
) -> tuple[Tensor, Tensor]:
    num_classes = _head_outputs(logits, head_weight)
    return features.new_empty(num_classes, features.shape[1]), features.new_empty(num_classes)


def _per_example_dot(features: Tensor, *rest: Any) -> Tensor:
    return features.new_empty(features.shape[0])


def _label_gradient(features: Tensor, logits: Any, head_weight: Any, *rest: Any) -> Tensor:
    return features.new_empty(features.shape[0], _head_outputs(logits, head_weight))


def _hessian_vector_product(
    features: Tensor,
    logits: Tensor,
    targets: Tensor | None,
    direction_weight: Tensor,
    direction_bias: Tensor | None,
    weights: Tensor | None,
    loss: int,
    damping: float,
) -> tuple[Tensor, Tensor]:
    num_classes, num_features = direction_weight.shape
    bias = 0 if direction_bias is None else num_classes
    return features.new_empty(num_classes, num_features), features.new_empty(bias)


def _feature_similarity(features_u: Tensor, features_h: Tensor, residual_h: Tensor, scale: float, bias: bool) -> Tensor:
    return features_u.new_empty(features_u.shape[0], residual_h.shape[1])


def _finite_difference_labels(logits_plus: Tensor, *rest: Any) -> Tensor:
    return logits_plus.new_empty(logits_plus.shape)


def _perturb_epsilon(direction: list[Tensor], radius: float) -> Tensor:
    wide = torch.float64 if any(v.dtype == torch.float64 for v in direction) else torch.float32
    return torch.empty((), dtype=wide, device=direction[0].device if direction else "cpu")


def _in_place(*arguments: Any) -> None:
    return None


_FAKES: dict[str, Callable[..., Any]] = {
    "last_layer_gradient": _last_layer_gradient,
    "per_example_dot": _per_example_dot,
    "label_gradient": _label_gradient,
    "hessian_vector_product": _hessian_vector_product,
    "last_layer_gradient_narrow": _last_layer_gradient,
    "per_example_dot_narrow": _per_example_dot,
    "label_gradient_narrow": _label_gradient,
    "hessian_vector_product_narrow": _hessian_vector_product,
    "feature_similarity": _feature_similarity,
    "finite_difference_labels": _finite_difference_labels,
    "perturb_epsilon": _perturb_epsilon,
    "perturb_": _in_place,
    "perturb_restore_": _in_place,
    "alignment_direction_": _in_place,
    "masked_adam_": _in_place,
}


def register() -> None:
    """Register the fake kernel and the guard of every operator the extension defines, and Triton's kernels."""
    if _extension._C is None:
        return
    for name, fake in _FAKES.items():
        if not hasattr(torch.ops.fastmeta, name):
            continue  # a build older than this source
        torch.library.register_fake(f"fastmeta::{name}", fake, lib=_LIBRARY)
        _LIBRARY.impl(name, _guard(name, mutates=name.endswith("_")), "Autograd", with_keyset=True)
        # The CUDA library registers the operators that are not in TRITON itself.
        if name in _kernels.TRITON and torch.backends.cuda.is_built() and not _extension.INTERPRETED:
            kernel = _kernels.automatic(name)
            if kernel is not None:
                _LIBRARY.impl(name, kernel, "CUDA")


register()
