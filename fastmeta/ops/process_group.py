"""Sums over the processes of a group: with them a batch that is spread over processes is one joined batch.

A mean over examples is the mean over the joined batch, every example with the same weight: sums and counts are added
over the processes and divided after that. So local batches may differ in size and one may be empty, where averaging
the local means would give the examples of a small batch more weight. Every process calls the same functions in the
same order with the same shapes, and receives the same numbers.

Without a group (None) these functions do nothing at all. Batch statistics are no sum of this kind: a BatchNorm in
train mode takes those of its own process, unless it is a ``torch.nn.SyncBatchNorm``, which has neither a forward mode
nor a second derivative: of the derivatives, differences alone go through it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
else:
    ProcessGroup = Any  # a build of PyTorch without torch.distributed has none

Group: TypeAlias = "ProcessGroup | None"


def check(process_group: Group) -> None:
    """Nothing for None or a group that this process is in.

    Raises:
        RuntimeError: torch.distributed is not available or not initialized.
        TypeError: not a group.
        ValueError: this process is not in the group.
    """
    if process_group is None:
        return
    if not torch.distributed.is_available():
        raise RuntimeError("process_group needs torch.distributed, which this build of PyTorch is without")
    if process_group is torch.distributed.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group must be a group that this process is in, got NON_GROUP_MEMBER")
    if not isinstance(process_group, torch.distributed.ProcessGroup):
        raise TypeError(
            f"process_group must be a torch.distributed.ProcessGroup or None, got {type(process_group).__name__}"
        )
    if not torch.distributed.is_initialized():
        raise RuntimeError(
            "process_group was given, but torch.distributed is not initialized: call init_process_group first"
        )


def world_size(group: Group) -> int:
    """Number of processes of the group; 1 without one."""
    return 1 if group is None else torch.distributed.get_world_size(group)


def running_processes() -> int:
    """Number of processes of the default group; 1 if there is none."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


def rank_in(group: Group) -> int:
    """Place of this process in the group; 0 without one."""
    return 0 if group is None else torch.distributed.get_rank(group)


def joined_rows(tensors: Sequence[Tensor], group: Group) -> tuple[list[Tensor], list[int]]:
    """The rows of all processes, in the order of their ranks; equal on all of them.

    The host learns how many rows there are, so with a group it waits for a GPU.

    Args:
        tensors: of one length, which may differ between the processes and be 0; else of the same shapes and dtypes.
        group: the processes.

    Returns:
        The tensors, and how many rows are whose. Without a group: the tensors themselves.

    >>> joined_rows([torch.ones(2, 3)], None)[1]
    [2]
    """
    count = len(tensors[0])
    if group is None:
        return list(tensors), [count]
    check(group)
    world = world_size(group)
    sizes = torch.full((1,), count, dtype=torch.int64, device=tensors[0].device)
    gathered = [torch.empty_like(sizes) for _ in range(world)]
    torch.distributed.all_gather(gathered, sizes, group=group)
    counts: list[int] = torch.cat(gathered).tolist()
    joined = []
    for tensor in tensors:
        padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
        padded[:count] = tensor.detach()
        parts = [torch.empty_like(padded) for _ in range(world)]
        if padded.numel():
            torch.distributed.all_gather(parts, padded, group=group)
        joined.append(torch.cat([part[:size] for part, size in zip(parts, counts, strict=True)]))
    return joined, counts


def sum_over(tensors: Sequence[Tensor], group: Group) -> list[Tensor]:
    """Every tensor summed over the processes, by one all-reduce for each dtype.

    The inputs stay as they are, the results are detached from them. Without a group: the tensors themselves.

    Args:
        tensors: of the same number, shapes and dtypes on every process; numbers, not bool.
        group: the processes.

    Returns:
        Tensors of the same shapes, equal on all processes; those of one dtype are views of one buffer.

    >>> sum_over([torch.ones(2)], None)
    [tensor([1., 1.])]
    """
    if group is None:
        return list(tensors)
    check(group)
    members: dict[tuple[torch.dtype, torch.device], list[int]] = {}  # in order of first appearance
    for i, tensor in enumerate(tensors):
        members.setdefault((tensor.dtype, tensor.device), []).append(i)
    summed: dict[int, Tensor] = {}
    for indices in members.values():
        flat = torch.cat([tensors[i].detach().reshape(-1) for i in indices])
        if flat.numel():
            torch.distributed.all_reduce(flat, group=group)
        for i, part in zip(indices, flat.split([tensors[i].numel() for i in indices]), strict=True):
            summed[i] = part.view(tensors[i].shape)
    return [summed[i] for i in range(len(tensors))]


def joined_count(count: int | Tensor, group: Group, device: torch.device | str) -> int | Tensor:
    """Number of examples over all processes.

    Args:
        count: number of examples of this process; a scalar tensor where that is counted on their device.
        group: the processes.
        device: where their tensors live; the backend of the group decides what it can sum.

    Returns:
        A number on the CPU and without a group; elsewhere an int64 scalar tensor, so that the host waits for nothing.

    >>> joined_count(3, None, "cpu")
    3
    """
    if group is None:
        return count
    check(group)
    total = torch.zeros((), dtype=torch.int64, device=device).add_(count)
    torch.distributed.all_reduce(total, group=group)
    return int(total) if total.is_cpu else total
