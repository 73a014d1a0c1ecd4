"""One system whose rows live on several processes.

Every process holds its own rows, and a copy of everything of the size of the solution. The Hessian is a sum over the
rows, so a product with it is the sum of the local ones: one all-reduce. A second moment, a dense Hessian and the
output factor are sums too. What is chosen from the number of rows is chosen from that of all processes, and so as one
process would with all the rows.

The copies may differ in their last bits, by the number of threads or the kind of machine. So nobody decides alone
whether to go on: a process that does would wait for the others for ever.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmeta import process_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Relative difference up to which two copies of a norm are those of one vector: they differ by rounding alone.
SAME = 1e-6


class Joined:
    """The processes that share a system.

    Args:
        group: the processes.
        counts: number of rows of each, in the order of their ranks.
        negative: whether an example weight of any is negative.
        device: where the system's tensors are.
    """

    def __init__(self, group: "ProcessGroup", counts: list[int], negative: bool, device: torch.device) -> None:
        self.group = group
        self.device = device
        self.count = sum(counts)
        self.negative = negative
        rank = torch.distributed.get_rank(group)
        self.is_first = rank == 0
        self._own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))

    def sum(self, *tensors: Tensor) -> list[Tensor]:
        """Over the processes; one all-reduce for tensors of one dtype."""
        return process_group.sum_over(tensors, self.group)

    def first(self, tensor: Tensor) -> Tensor:
        """The first process's copy."""
        return self.sum(tensor if self.is_first else torch.zeros_like(tensor))[0]

    def agreed(self, *numbers: float) -> list[float]:
        """The first process's copies."""
        return self.first(torch.tensor(numbers, dtype=torch.float64, device=self.device)).tolist()

    def all_rows(self, rows: Tensor) -> Tensor:
        """The rows of all processes, ``[N, K]``."""
        table = rows.new_zeros(self.count, rows.shape[1])
        table[self._own] = rows
        return self.sum(table)[0]

    def own_rows(self, rows: Tensor) -> Tensor:
        """This process's part of :meth:`all_rows`."""
        return rows[self._own]


def meet(
    group: "ProcessGroup",
    features: Tensor,  # [N, D]
    weights: Tensor | None,  # [N]
    rhs: Tensor,  # [C, K]
    settings: Mapping[str, float],
    fault: ValueError | None,
) -> Joined:
    """Exchange what the processes must know of each other: one all-reduce, and the host waits for it.

    Args:
        group: the processes.
        features: the rows of this one.
        weights: their weights.
        rhs: right-hand side; the same on every process.
        settings: named numbers that are the same on every process.
        fault: what is wrong with this process's input, to be raised by all.

    Raises:
        ValueError: an input of any process is at fault, or the right-hand side or a setting is not the same on all.
    """
    process_group.check(group)
    size, rank = process_group.world_size(group), torch.distributed.get_rank(group)
    table = torch.zeros(size, 4 + len(settings), dtype=torch.float64)
    known = [features.shape[0], 0, fault is not None, 0, *settings.values()]
    table[rank] = torch.tensor(known, dtype=torch.float64)
    table = table.to(features.device)
    table[rank, 3] = torch.linalg.vector_norm(rhs, dtype=torch.float64)
    if weights is not None:
        table[rank, 1] = (weights < 0).any()
    every = process_group.sum_over([table], group)[0].tolist()
    if fault is not None:
        raise fault
    for other, row in enumerate(every):
        if row[2]:
            raise ValueError(f"features, logits, rhs and weights must be finite on every process, not on {other}")
        if abs(row[3] - every[0][3]) > SAME * every[0][3]:
            raise ValueError(
                "rhs_weight and rhs_bias must be the same on every process of process_group, their norm is "
                f"{every[0][3]:.6g} on 0 and {row[3]:.6g} on {other}"
            )
        for name, here, there in zip(settings, every[0][4:], row[4:], strict=True):
            if here != there:
                raise ValueError(f"{name} must be the same on every process of process_group, not so on {other}")
    return Joined(group, [int(row[0]) for row in every], any(row[1] for row in every), features.device)
