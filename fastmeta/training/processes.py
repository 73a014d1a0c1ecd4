"""The processes of a run: who this one is, and what all of them must agree on."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed
from torch import Tensor

from fastmeta.ops.process_group import Group

TIMEOUT = timedelta(seconds=60)  # after which the others notice that one is gone


@dataclass(frozen=True)
class Processes:
    """This process among those of a run.

    Args:
        group: the processes; None: one alone.
    """

    group: Group = None

    @property
    def rank(self) -> int:
        """Place of this process."""
        return 0 if self.group is None else torch.distributed.get_rank(self.group)

    @property
    def count(self) -> int:
        """How many there are."""
        return 1 if self.group is None else torch.distributed.get_world_size(self.group)

    @property
    def is_first(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def share(self, rows: int, batch: int) -> float:
        """The factor of a mean over ``rows`` of the ``batch`` examples of all: ``rows W / batch``."""
        return rows * self.count / batch

    def sum_(self, tensor: Tensor) -> Tensor:
        """``tensor`` becomes its sum over the processes."""
        if self.group is not None:
            torch.distributed.all_reduce(tensor, group=self.group)
        return tensor

    def extremum_(self, tensor: Tensor, which: Literal["max", "min"]) -> Tensor:
        """``tensor`` becomes its largest or smallest over the processes."""
        if self.group is not None:
            operation = torch.distributed.ReduceOp.MAX if which == "max" else torch.distributed.ReduceOp.MIN
            torch.distributed.all_reduce(tensor, operation, group=self.group)
        return tensor

    def broadcast_(self, tensors: list[Tensor]) -> None:
        """``tensors`` become those of the first process."""
        if self.group is None or not tensors:
            return
        flat = torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors])
        torch.distributed.broadcast(flat, 0, group=self.group)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view(tensor.shape))

    def joined(self, values: dict[str, str]) -> dict[str, str]:
        """What any of them has; of one key, the value of the last."""
        if self.group is None:
            return values
        parts: list[dict[str, str]] = [{}] * self.count
        torch.distributed.all_gather_object(parts, values, group=self.group)
        return {key: value for part in parts for key, value in part.items()}

    def part(self, count: int) -> slice:
        """This process's part of ``count`` things."""
        return slice(self.rank * count // self.count, (self.rank + 1) * count // self.count)


@contextmanager
def launched(device: str) -> Iterator[Processes]:
    """The processes that torchrun started, or this one alone.

    Their collectives give up after a minute, so that all of them end when one is gone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes()
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, timeout=TIMEOUT, **_meeting())
    try:
        yield Processes(torch.distributed.group.WORLD)
    finally:
        torch.distributed.destroy_process_group()


def _meeting() -> dict[str, Any]:
    """Where the processes find each other: nothing to say, but for restarts by torchrun on one machine.

    It keeps one store for all attempts, in which new processes find the addresses of the dead (torch 2.13,
    https://github.com/pytorch/pytorch/issues/135712): each attempt gets keys of its own. Agents on several machines
    count their attempts differently; there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun does it.
    """
    given = os.environ
    if given.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or given.get("GROUP_WORLD_SIZE") != "1":
        return {}
    store = torch.distributed.TCPStore(
        given["MASTER_ADDR"], int(given["MASTER_PORT"]), is_master=False, timeout=TIMEOUT
    )
    attempt = torch.distributed.PrefixStore(f"attempt-{given['TORCHELASTIC_RESTART_COUNT']}", store)
    return {"store": attempt, "rank": int(given["RANK"]), "world_size": int(given["WORLD_SIZE"])}
