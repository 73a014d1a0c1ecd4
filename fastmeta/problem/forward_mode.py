"""Forward mode through any module: PyTorch's dual tensors, and four repairs.

A dual tensor carries its tangent along. While a model runs on dual tensors:

* what it computes in ``torch.no_grad`` is a constant; PyTorch would propagate tangents there;
* a ``torch.autograd.Function`` that reads a moving tensor beside its arguments raises; its tangent would be lost;
* an operator that is not PyTorch's own (``torch.library.custom_op``, C++) and drops the tangent raises; PyTorch would
  not say so;
* functions without a forward-mode derivative, or with a slow one, are replaced by those in ``RULES``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch.autograd import forward_ad
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fastmeta.problem.hidden_reads import GET_DATA, DataChanges, has_tensor, refuse_hidden, tensors


class ForwardMode(TorchFunctionMode):
    """The mode in which a model runs on dual tensors; see above.

    Attributes:
        changes: of parameters, by their ``.data``.
        saw_hooks: whether a part of the model ran under hooks of its own for the tensors that autograd saves, as
            checkpointed blocks do. A backward pass of what was recorded with tangents cannot recompute these.
    """

    def __init__(self) -> None:
        super().__init__()
        self.saw_hooks = False
        self.changes = DataChanges()
        self._hooks_outside = _saved_tensors_hooks()

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function == GET_DATA:
            return self.changes.run(function, args)
        if not torch._C._is_fwd_grad_enabled():  # in a Function's forward, or in torch.inference_mode
            result = function(*args, **kwargs)
            if has_tensor(result):
                refuse_hidden([tensor for tensor in tensors([*args, *kwargs.values()]) if _moves(tensor)])
            return result
        self.saw_hooks = self.saw_hooks or _saved_tensors_hooks() != self._hooks_outside
        if not torch.is_grad_enabled():
            with forward_ad._set_fwd_grad_enabled(False):
                return function(*args, **kwargs)
        if isinstance(function, (OpOverload, OpOverloadPacket)):
            result = function(*args, **kwargs)
            _check_tangents(function, [*args, *kwargs.values()], result)
            return result
        if function in _FREEZING and (*args[1:], *kwargs.values()) == (False,) and _moves(args[0]):
            raise NotImplementedError("requires_grad is turned off inside of the model, which a tangent does not see")
        rule = RULES.get(function)
        return function(*args, **kwargs) if rule is None else rule(*args, **kwargs)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """The Jacobian by the input is symmetric, so batch norm's backward kernel gives the tangent, in one pass.

    PyTorch's own formula takes a dozen operators, each of them recorded where autograd records.
    """
    if training and input.numel() == input.shape[1]:
        return functional.batch_norm(input, None, None, training=True)  # raises: no statistics of one value
    if input.numel() == 0:  # the backward below divides by the number of examples
        return functional.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    x, dx = _parts(input)
    w, dw = (None, None) if weight is None else _parts(weight)
    b, db = (None, None) if bias is None else _parts(bias)
    statistics = (running_mean, running_var)
    y, mean, deviation = torch.native_batch_norm(x, w, b, *statistics, training, momentum, eps)
    with torch.no_grad():
        if not training:
            assert running_mean is not None
            assert running_var is not None
            mean, deviation = running_mean, (running_var + eps).rsqrt()
        dy = None
        if dx is not None:
            backward = torch.ops.aten.native_batch_norm_backward
            dy = backward(dx, x, w, *statistics, mean, deviation, training, eps, [True, False, False])[0]
        shape = [1, -1] + [1] * (x.dim() - 2)
        # dw (x - mean) / deviation + db = slope x + shift
        slope = None if dw is None else dw * deviation
        shift = db
        if slope is not None:
            shift = torch.addcmul(torch.zeros_like(mean) if db is None else db, slope, mean, value=-1)
            moved = slope.view(shape).to(x.dtype)
            dy = x * moved if dy is None else dy.addcmul_(x, moved)
        if shift is not None:
            moved = shift.view(shape).to(x.dtype)
            dy = moved.expand_as(y) if dy is None else dy.add_(moved)
    return y if dy is None else forward_ad.make_dual(y, dy)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _embedding_bag(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Sums and means are linear in the weight; a maximum is left to PyTorch, which refuses it."""
    (w, dw), mode = _parts(weight), kwargs.get("mode", args[4] if len(args) > 4 else "mean")
    weighted = kwargs.get("per_sample_weights", args[6] if len(args) > 6 else None)
    if dw is None or mode == "max" or (weighted is not None and _moves(weighted)):
        return functional.embedding_bag(input, weight, *args, **kwargs)
    with torch.no_grad():
        tangent = functional.embedding_bag(input, dw, *args, **kwargs)
    return forward_ad.make_dual(functional.embedding_bag(input, w, *args, **kwargs), tangent)


# Functions without a forward-mode derivative, or with a slow one.
RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    functional.batch_norm: _batch_norm,
    functional.embedding_bag: _embedding_bag,
    torch._weight_norm: _weight_norm,
}


# x.requires_grad = False, x.requires_grad_(False)
_FREEZING = (Tensor.requires_grad.__set__, Tensor.requires_grad_)  # type: ignore[attr-defined]


def _parts(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    if torch.is_inference_mode_enabled():  # where nothing moves
        return tensor, None
    primal, tangent = forward_ad.unpack_dual(tensor)
    return primal, tangent


def _moves(tensor: Tensor) -> bool:
    """Whether it has a tangent, also where forward mode is off."""
    with forward_ad._set_fwd_grad_enabled(True):
        return _parts(tensor)[1] is not None


def _saved_tensors_hooks() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def _check_tangents(operator: OpOverload | OpOverloadPacket, arguments: list[Any], result: Any) -> None:
    """Raise if an operator took tangents and returned none."""
    name = str(operator)
    if torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.ADInplaceOrView):
        return  # inside of another operator, which autograd has dealt with
    if name.startswith("aten.") or not any(_parts(tensor)[1] is not None for tensor in tensors(arguments)):
        return
    overload = operator if isinstance(operator, OpOverload) else getattr(operator, operator.overloads()[0])
    results = [tensor for tensor in tensors([result]) if tensor.is_floating_point()]
    lost = results and all(_parts(tensor)[1] is None for tensor in results)
    if lost or overload._schema.is_mutable:
        raise NotImplementedError(f"{name} has no forward-mode derivative")
