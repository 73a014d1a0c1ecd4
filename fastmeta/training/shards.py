"""A model whose parameters are spread over processes (FSDP2), each with a part of every one."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from fastmeta.ops.process_group import Group
from fastmeta.problem.sharded import local

_UNIT = 2**20  # parameters that are gathered together, or more where one layer has more
_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(model: nn.Module, head: nn.Module, group: Group, device: torch.device) -> None:
    """Spread the parameters of ``model`` over the processes, but for those of ``head``, its last layer.

    Last-layer methods read the head's weight between a forward and its backward, so each process keeps all of it, and
    has to average its gradient itself. The other parameters are gathered as they are needed, some layers at a time.
    """
    assert group is not None
    mesh = DeviceMesh.from_group(group, device.type)
    kept = set(head.to(device).parameters())
    for unit in _units(model, kept):
        fully_shard(unit, mesh=mesh, ignored_params=kept)
    fully_shard(model, mesh=mesh, ignored_params=kept)


def is_sharded(model: nn.Module) -> bool:
    """Whether :func:`shard` was here."""
    return isinstance(model, FSDPModule)


def _units(model: nn.Module, kept: set[nn.Parameter]) -> list[nn.Module]:
    """Modules that are gathered as one: as small as they may be with ``_UNIT`` parameters, inner ones first."""
    found = []
    for child in model.children():
        count = sum(parameter.numel() for parameter in child.parameters() if parameter not in kept)
        holds_others = isinstance(child, (nn.Sequential, nn.ModuleList, nn.ModuleDict))  # whose forward may never run
        inner = _units(child, kept) if count > _UNIT or holds_others else []
        found += inner if holds_others or not count else [*inner, child]
    return found


class Shards(nn.ParameterList):
    """The trainable parameters of a sharded model, as plain tensors: what an optimizer and foreach functions take.

    Args:
        model: a model after :func:`shard`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._whole = [parameter for parameter in model.parameters() if parameter.requires_grad]
        super().__init__(nn.Parameter(local(parameter)) for parameter in self._whole)

    def take_gradients(self) -> list[Tensor]:
        """Give each its part of the gradient; those that every process has for itself, to be averaged."""
        own = []
        for part, whole in zip(self, self._whole, strict=True):
            part.grad = None if whole.grad is None else local(whole.grad)
            if part.grad is not None and not isinstance(whole, DTensor):
                own.append(part.grad)
        return own

    def spread(self, state: dict[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
        """An optimizer's state for a checkpoint that any number of processes may read.

        Args:
            state: of the optimizer.
            parameters: the optimizer's, in its order; those of other modules stay what they are.
        """
        wholes = {id(part): whole for part, whole in zip(self, self._whole, strict=True)}

        def put(value: Any, place: int) -> Any:
            whole = wholes.get(id(parameters[place]))
            if not isinstance(value, Tensor) or not isinstance(whole, DTensor) or value.dim() == 0:
                return value
            return DTensor.from_local(
                value, whole.device_mesh, whole.placements, shape=whole.shape, stride=whole.stride()
            )

        return _each(state, put)

    def gather(self, state: dict[str, Any]) -> dict[str, Any]:
        """This process's part of what :meth:`spread` gave."""
        return _each(state, lambda value, place: local(value) if isinstance(value, Tensor) else value)


def _each(state: dict[str, Any], change: Any) -> dict[str, Any]:
    moments = {
        place: {name: change(value, place) for name, value in values.items()}
        for place, values in state["state"].items()
    }
    return {**state, "state": moments}


def whole_state(model: nn.Module) -> dict[str, Any]:
    """A copy of a model's state; of a sharded one with whole tensors, on the CPU of the first process, {} on others."""
    if is_sharded(model):
        return get_model_state_dict(model, options=_FULL)
    return copy.deepcopy(model.state_dict())


def load_whole_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Load what :func:`whole_state` gave; every process calls it."""
    if not is_sharded(model):
        model.load_state_dict(state)
        return
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, dict(state), options=options)  # it puts parts into what it is given
