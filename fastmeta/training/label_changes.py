"""Remembers what a method made of each unlabeled example's label, without waiting for a device."""

from typing import Any

import torch
from torch import Tensor

from fastmeta.training.processes import Processes


class LabelChanges:
    """For each unlabeled example the largest change of its label so far, ``sum_c |after - before|``, and what it was.

    Args:
        num_examples: M.
        device: where the batches live.

    >>> changes = LabelChanges(8)
    >>> before, after = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    >>> changes.add(5, torch.tensor([7, 3]), before, after)
    >>> changes.largest(1)[0]["index"], changes.largest(1)[0]["after"]
    (3, 1)
    """

    def __init__(self, num_examples: int, device: torch.device | str = "cpu") -> None:
        self.change = torch.zeros(num_examples, device=device)
        # step, class and probability before, class and probability after
        self.values = torch.zeros(num_examples, 5, device=device)

    def add(self, step: int, index: Tensor, before: Tensor, after: Tensor) -> None:
        """Offer a batch: places ``index [N]``, labels ``before`` and ``after`` ``[N, C]``."""
        change = (after - before).abs().sum(dim=1).float()
        row = _largest_of_each(index, change)  # an example may be in a batch more than once
        index, change, before, after = index[row], change[row], before[row], after[row]
        old = self.change[index]
        larger = change > old
        probability_before, class_before = before.float().max(dim=1)
        probability_after, class_after = after.float().max(dim=1)
        steps = torch.full_like(change, step)
        values = torch.stack([steps, class_before, probability_before, class_after, probability_after], dim=1)
        self.change[index] = torch.where(larger, change, old)
        self.values[index] = torch.where(larger.unsqueeze(1), values, self.values[index])

    def join(self, processes: Processes) -> None:
        """The largest changes of all processes, on all of them; of equal ones the first."""
        if processes.group is None:
            return
        largest = processes.extremum_(self.change.clone(), "max")
        steps = self.values[:, 0]
        first = processes.extremum_(torch.where(self.change == largest, steps, torch.inf), "min")
        mine = (self.change == largest) & (steps == first)
        owner = processes.extremum_(torch.where(mine, processes.rank, processes.count), "min")
        self.values *= (owner == processes.rank).unsqueeze(1)
        processes.sum_(self.values)
        self.change = largest

    def largest(self, count: int) -> list[dict[str, Any]]:
        """The examples with the largest changes, largest first; those that hardly changed are left out."""
        order = torch.argsort(self.change, descending=True, stable=True)[:count].cpu()
        return [self.row(place) for place in order.tolist() if float(self.change[place]) > 1e-3]

    def row(self, place: int) -> dict[str, Any]:
        """What is known of one example."""
        step, class_before, before, class_after, after = self.values[place].tolist()
        return {
            "index": place,
            "change": float(self.change[place]),
            "step": int(step),
            "before": int(class_before),
            "after": int(class_after),
            "confidence_before": before,
            "confidence_after": after,
        }

    def state_dict(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {"change": self.change, "values": self.values}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from :meth:`state_dict`."""
        self.change.copy_(state["change"])
        self.values.copy_(state["values"])


def _largest_of_each(index: Tensor, change: Tensor) -> Tensor:
    """Rows ``[N]``, that of the largest ``change`` for each row's ``index``: equal for all rows of one example."""
    order = change.argsort(descending=True, stable=True)
    order = order[index[order].argsort(stable=True)]
    sorted_index = index[order]
    starts = torch.arange(len(index), device=index.device)
    starts[1:] *= sorted_index[1:] != sorted_index[:-1]
    return order[starts.cummax(dim=0).values]
