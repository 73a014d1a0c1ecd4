"""Remembers the examples whose labels a method changed most."""

from typing import Any

from torch import Tensor


class LargestRefinements:
    """The ``capacity`` images with the largest change of label, ``sum_c |after - before|``, each at its largest.

    Args:
        capacity: how many images to remember.

    >>> import torch
    >>> largest = LargestRefinements(capacity=1)
    >>> before, after = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    >>> largest.add(5, torch.tensor([7, 3]), before, after)
    >>> largest.rows()[0]["index"]
    3
    """

    def __init__(self, capacity: int = 16) -> None:
        self.capacity = capacity
        self._rows: dict[int, dict[str, Any]] = {}

    def add(self, step: int, index: Tensor, before: Tensor, after: Tensor) -> None:
        """Offer a batch: places ``index [N]``, labels ``before`` and ``after`` ``[N, C]``."""
        change = (after - before).abs().sum(dim=1)
        floor = min((row["change"] for row in self._rows.values()), default=0.0)
        if len(self._rows) < self.capacity:
            floor = 0.0
        for place in (change > max(floor, 1e-3)).nonzero().flatten().tolist():
            key, size = int(index[place]), float(change[place])
            if key in self._rows and self._rows[key]["change"] >= size:
                continue
            self._rows[key] = {
                "index": key,
                "change": size,
                "step": step,
                "before": before[place].tolist(),
                "after": after[place].tolist(),
            }
        if len(self._rows) > self.capacity:
            self._rows = {row["index"]: row for row in self.rows()}

    def rows(self) -> list[dict[str, Any]]:
        """The remembered images, largest change first."""
        return sorted(self._rows.values(), key=lambda row: (-row["change"], row["index"]))[: self.capacity]

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"rows": self.rows()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self._rows = {row["index"]: row for row in state["rows"]}
