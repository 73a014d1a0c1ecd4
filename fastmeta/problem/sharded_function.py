"""A model whose parameters are spread over processes (FSDP2): moved, run and differentiated through its hooks."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fastmeta.ops.process_group import Group, sum_over, world_size
from fastmeta.problem.direction import Vector
from fastmeta.problem.evaluation import Mode
from fastmeta.problem.forward_mode import ForwardMode
from fastmeta.problem.input_copies import InputCopies
from fastmeta.problem.model_function import Inputs, LossOfLogits, ModelFunction, arguments_of
from fastmeta.problem.model_logits import logits_of
from fastmeta.problem.sharded import is_spread, local

DIFFERENCES = ("finite_difference", "forward_difference")


class ShardedFunction(ModelFunction):
    """:class:`ModelFunction` of a model after ``fully_shard``.

    ``parameters`` are this process's parts, on the memory that the next gather reads: moved in place they move the
    model. Parameters that every process has whole are their own part. Gradients are a backward pass of the model,
    whose hooks give each process its part; ``.grad`` is as before after it.

    Args:
        model: the module, on a mesh of one dimension.
        mode: see :class:`ModelFunction`.
        process_group: of the same processes as the mesh.

    Raises:
        ValueError: the group is another, or gradients are not averaged as FSDP2 does by itself.
    """

    sharded = True

    def __init__(self, model: nn.Module, *, mode: Mode | None = None, process_group: Group) -> None:
        self._group = process_group
        self._units: list[Any] = [part for part in model.modules() if hasattr(part, "set_requires_gradient_sync")]
        self._gather_anew()
        super().__init__(model, mode=mode)

    def _check_parts(self) -> None:
        for parameter in self.module.parameters():
            mesh = getattr(parameter, "device_mesh", None)
            if mesh is not None and (mesh.ndim != 1 or mesh.size() != world_size(self._group)):
                raise ValueError(
                    "process_group must have the processes of the mesh that the model is sharded over, "
                    f"{list(mesh.shape)}, got {world_size(self._group)}"
                )
        for unit in self._units:
            for group in unit._get_fsdp_state()._fsdp_param_groups:
                if group.gradient_divide_factor is not None:
                    factor = group.gradient_divide_factor
                    raise ValueError(f"model must average its gradients over the processes, but divides by {factor}")

    def _part(self, parameter: Tensor) -> Tensor:
        return local(parameter)

    def _gather_anew(self) -> None:
        """Drop what is gathered: the root keeps it from a forward to its backward, which gathers it anew, too."""
        for unit in self._units:
            unit.reshard()

    def joined(self, gradient: Vector, group: Group) -> Vector:
        """See :meth:`ModelFunction.joined`; the model's hooks have averaged the parts over the processes."""
        own = [name for name in gradient if not is_spread(self._own[name])]
        summed = dict(zip(own, sum_over([gradient[name] for name in own], group), strict=True))
        return {name: summed[name] if name in summed else value * world_size(group) for name, value in gradient.items()}

    def norm(self, direction: Vector) -> Tensor:
        """See :meth:`ModelFunction.norm`; over the parts of all processes."""
        parts = [(is_spread(self._own[name]), v) for name, v in direction.items()]
        squares = [
            torch.stack([torch.linalg.vector_norm(v, dtype=torch.float64) for spread, v in parts if spread is which])
            .square()
            .sum()
            if any(spread is which for spread, _ in parts)
            else torch.zeros((), dtype=torch.float64, device=parts[0][1].device)
            for which in (True, False)
        ]
        spread, own = squares
        (total,) = sum_over([spread.view(1)], self._group)
        length = (total[0] + own).sqrt().to(torch.promote_types(parts[0][1].dtype, torch.float32))
        return length.clamp_min(torch.finfo(length.dtype).tiny)

    def gradient(
        self,
        inputs: Inputs,
        loss: LossOfLogits,
        parameters: Vector | None = None,
        names: Sequence[str] | None = None,
    ) -> tuple[Vector, Tensor]:
        """See :meth:`ModelFunction.gradient`."""
        theta = self.parameters if parameters is None else parameters
        with torch.enable_grad(), self._at(theta), self._evaluator.same_gradients():
            logits = self._call(self.parameters, inputs)
            value = loss(logits)
            with self._evaluator.evaluation({}):  # activation checkpointing runs the model again
                value.backward()
                self._gather_anew()
            grads = {name: self._own[name].grad for name in (self._own if names is None else names)}
            spread = [grads[name] for name in grads if is_spread(self._own[name])]
            if spread and all(grad is None for grad in spread):
                raise ValueError("model must reduce its gradients, but set_requires_gradient_sync(False) is in effect")
        found = {
            name: torch.zeros_like(self.parameters[name]) if grad is None else local(grad)
            for name, grad in grads.items()
        }
        return found, logits.detach()

    def gradient_at(self, logits: Tensor, loss: LossOfLogits) -> Vector:
        """Raises ValueError: there is no second gradient on one graph of a sharded model."""
        _refuse("labels must be given for a model whose parameters are sharded, where a gradient of C^U is needed")

    def hessian(self, *arguments: Any, **options: Any) -> NoReturn:
        """Raises ValueError: it takes whole parameters."""
        _refuse("model must have whole parameters for a Hessian-vector product")

    gauss_newton = hessian

    def _call(
        self,
        parameters: Vector,
        inputs: Inputs,
        *,
        derivative: bool = False,
        on_graph: bool = False,
        inside: ForwardMode | None = None,
    ) -> Tensor:
        copied = InputCopies(on_graph=on_graph)
        positional, keywords = arguments_of(inputs, copied)
        here = {} if on_graph else parameters
        with self._at(here), self._evaluator.evaluation({}, on_graph=on_graph):
            self._gather_anew()
            try:
                logits = logits_of(self.module(*positional, **keywords))
            finally:
                self._gather_anew()
        copied.check_unchanged()
        return logits

    @contextlib.contextmanager
    def _at(self, parameters: Vector) -> Iterator[None]:
        """The model's parts have these values in the block, and are what they were after it, bit for bit."""
        moved = [name for name, value in parameters.items() if value.data_ptr() != self.parameters[name].data_ptr()]
        own = [self.parameters[name] for name in moved]
        before = [value.clone() for value in own]
        # The caller's graph may hold a parameter that is no part: its values are those of before again.
        with torch.autograd._unsafe_preserve_version_counter(tuple(own)):
            try:
                _copy_(own, [parameters[name] for name in moved])
                yield
            finally:
                _copy_(own, before)


@torch.no_grad()
def _copy_(into: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(into, values, strict=True):
        tensor.copy_(value)


def function_of(model: nn.Module, *, mode: Mode | None, how: str, process_group: Group) -> ModelFunction:
    """The model as a function, also where differences are all that can be taken of it.

    Raises:
        ValueError: its parameters are sharded, and ``how`` needs whole ones.
    """
    if how in DIFFERENCES and process_group is not None and any(map(is_spread, model.parameters())):
        return ShardedFunction(model, mode=mode, process_group=process_group)
    return ModelFunction(model, mode=mode)


def _refuse(words: str) -> NoReturn:
    raise ValueError(words)
