"""A table of parameters for the unlabeled examples, stepped by Masked Adam."""

from typing import Literal

import torch
from torch import Tensor

from fastmeta import ops
from fastmeta.state import Number, Stateful


class MaskedAdamTable(Stateful):
    """One row of parameters for each unlabeled example, with Masked Adam: only sampled rows move and age.

    Not All Unlabeled Data Are Equal, Appendix C. The table moves to the device of the first gradient.

    Args:
        values: initial values ``[M]`` or ``[M, C]``.
        lr: learning rate.
        betas: decays of the two moments.
        eps: added to the root of the second moment.
        low: lower bound of a value.
        high: upper bound of a value.
        duplicates: of an example that comes twice in a batch, ``sum`` the gradients or use the ``last`` one.
    """

    lr = Number()
    values: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    steps: Tensor

    def __init__(
        self,
        values: Tensor,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        low: float | None = None,
        high: float | None = None,
        duplicates: Literal["sum", "last"] = "sum",
    ) -> None:
        if duplicates not in ("sum", "last"):
            raise ValueError(f"duplicates must be 'sum' or 'last', got {duplicates!r}")
        super().__init__()
        self.lr = lr
        self.betas = betas
        self.eps = eps
        self.low = low
        self.high = high
        self.duplicates = duplicates
        self.register_buffer("values", values)
        self.register_buffer("exp_avg", torch.zeros_like(values))
        self.register_buffer("exp_avg_sq", torch.zeros_like(values))
        self.register_buffer("steps", torch.zeros(values.shape[0], dtype=torch.int32, device=values.device))

    def rows(self, index: Tensor) -> Tensor:
        """A copy of the rows ``index``."""
        self.move(index.device)
        return self.values[self._checked(index)]

    def step_(self, index: Tensor, gradient: Tensor) -> None:
        """One step of Masked Adam on the rows ``index [n]``; a repeated index takes one step."""
        self.move(index.device)
        gradient = gradient.to(self.values.dtype)
        if self.duplicates == "last":
            gradient = gradient * last_of_each(index).to(gradient).view(-1, *[1] * (gradient.dim() - 1))
        ops.masked_adam_(
            self.values,
            index,
            gradient,
            self.exp_avg,
            self.exp_avg_sq,
            self.steps,
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            low=self.low,
            high=self.high,
        )

    def move(self, device: torch.device) -> None:
        """Move the table to where its rows are used."""
        if self.values.device != device:
            self.to(device)

    def _checked(self, index: Tensor) -> Tensor:
        # On a GPU the check would wait for the device.
        if index.is_cpu and len(index):
            low, high = int(index.min()), int(index.max())
            if low < 0 or high >= len(self.values):
                bad = low if low < 0 else high
                raise IndexError(f"index must be places in the unlabeled set, in [0, {len(self.values)}), got {bad}")
        return index


def last_of_each(index: Tensor) -> Tensor:
    """Where a number is not followed by another of its kind. bool ``[n]``.

    >>> last_of_each(torch.tensor([5, 2, 5, 7]))
    tensor([False,  True,  True,  True])
    """
    order = index.argsort(stable=True)
    in_order = index[order]
    last = torch.ones_like(index, dtype=torch.bool)
    last[:-1] = in_order[1:] != in_order[:-1]
    return torch.empty_like(last).scatter_(0, order, last)
