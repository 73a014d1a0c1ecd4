"""A table of parameters for the unlabeled examples, stepped by Masked Adam."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from fastmeta import ops


class MaskedAdamTable:
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
        self.lr = lr
        self.betas = betas
        self.eps = eps
        self.low = low
        self.high = high
        self.duplicates = duplicates
        self.values = values
        self.exp_avg = torch.zeros_like(values)
        self.exp_avg_sq = torch.zeros_like(values)
        self.steps = torch.zeros(values.shape[0], dtype=torch.int32, device=values.device)

    def rows(self, index: Tensor) -> Tensor:
        """A copy of the rows ``index``."""
        self.to(index.device)
        return self.values[self._checked(index)]

    def step_(self, index: Tensor, gradient: Tensor) -> None:
        """One step of Masked Adam on the rows ``index [n]``; a repeated index takes one step."""
        self.to(index.device)
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

    def to(self, device: torch.device | str) -> None:
        """Move the table."""
        if self.values.device == torch.device(device):
            return
        for name in ("values", "exp_avg", "exp_avg_sq", "steps"):
            setattr(self, name, getattr(self, name).to(device))

    def state_dict(self) -> dict[str, Any]:
        """Values, both moments and the step count of every row."""
        return {name: getattr(self, name).clone() for name in ("values", "exp_avg", "exp_avg_sq", "steps")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`state_dict`.

        Raises:
            ValueError: a tensor is missing or of another shape.
        """
        for name in ("values", "exp_avg", "exp_avg_sq", "steps"):
            own = getattr(self, name)
            if name not in state:
                raise ValueError(f"state must have {name!r}, got {sorted(state)}")
            if state[name].shape != own.shape:
                raise ValueError(f"{name} must be {list(own.shape)} like the table, got {list(state[name].shape)}")
        for name in ("values", "exp_avg", "exp_avg_sq", "steps"):
            own = getattr(self, name)
            setattr(self, name, state[name].to(device=own.device, dtype=own.dtype, copy=True))

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
