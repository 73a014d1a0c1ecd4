"""A table of parameters for the unlabeled examples, stepped by Masked Adam, Adam or SGD."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastmeta import checks, ops
from fastmeta.ops.found_inf import found_inf
from fastmeta.ops.process_group import Group, check, joined_rows, rank_in, sum_over, world_size
from fastmeta.state import Number, Stateful, entry

_NAMES = ("values", "exp_avg", "exp_avg_sq", "steps")

TableOptimizer = Literal["masked_adam", "adam", "sgd"]


class MaskedAdamTable(Stateful):
    """One row of parameters for each unlabeled example, with Masked Adam: only sampled rows move and age.

    Not All Unlabeled Data Are Equal, Appendix C. The table moves to the device of the first gradient. A step whose
    gradients are not all finite changes nothing: one of them would poison the moments of its row for ever.

    The same paper compares (Fig. 4) plain ``adam``, for which rows that are not sampled have a gradient of 0, so that
    their moments fade and go on to move them (Label Gradient Alignment prints it, too), and ``sgd``. A step of either
    goes through the whole table.

    Over the processes of a group a step is one on the joined batch: its rows and gradients travel to every process, in
    the order of the ranks, and all tables stay equal. ``sharded`` keeps row i on process ``i % processes`` alone, as
    plain attributes: what DistributedDataParallel broadcasts are buffers. A read then is a sum over the processes, and
    ``state_dict`` gathers the complete table; every process must call it.

    Args:
        values: initial values ``[M]`` or ``[M, C]``.
        lr: learning rate.
        optimizer: ``masked_adam``, ``adam`` or ``sgd``.
        betas: decays of the two moments.
        eps: added to the root of the second moment.
        low: lower bound of a value.
        high: upper bound of a value.
        duplicates: of an example that comes twice in a batch, ``sum`` the gradients or use the ``last`` one.
        process_group: processes that the batch is spread over.
        sharded: whether a process keeps its own part of the rows alone.

    Raises:
        ValueError: ``sharded`` without a group, or an option is not one of those named.
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
        optimizer: TableOptimizer = "masked_adam",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        low: float | None = None,
        high: float | None = None,
        duplicates: Literal["sum", "last"] = "sum",
        process_group: Group = None,
        sharded: bool = False,
    ) -> None:
        super().__init__()
        if duplicates not in ("sum", "last"):
            raise ValueError(f"duplicates must be 'sum' or 'last', got {duplicates!r}")
        checks.choice(optimizer, "optimizer", *get_args(TableOptimizer))
        check(process_group)
        if sharded and process_group is None:
            raise ValueError("sharded needs a process_group, got None")
        self.lr = lr
        self.optimizer = optimizer
        self.betas = betas
        self.eps = eps
        self.low = low
        self.high = high
        self.duplicates = duplicates
        self.process_group = process_group
        self.sharded = sharded
        self.num_rows = len(values)
        values = self._own(values).contiguous() if sharded else values.contiguous()
        steps = torch.zeros(values.shape[0], dtype=torch.int32, device=values.device)
        for name, tensor in zip(
            _NAMES, (values, torch.zeros_like(values), torch.zeros_like(values), steps), strict=True
        ):
            if sharded:
                setattr(self, name, tensor)
            else:
                self.register_buffer(name, tensor)

    @property
    def _held(self) -> dict[str, Any]:
        """Where the tensors are: a lookup in it costs a tenth of an attribute of a module."""
        return vars(self) if self.sharded else self._buffers

    def rows(self, index: Tensor) -> Tensor:
        """A copy of the rows ``index``."""
        self.move(index.device)
        self._check(index)
        if not self.sharded:
            return self._held["values"][index]
        (places,), counts = joined_rows([index], self.process_group)
        place, world = rank_in(self.process_group), world_size(self.process_group)
        own = places % world == place
        # A row is that of its owner and 0 of the others.
        held = self.values[torch.where(own, places // world, 0)] if len(self.values) else self.values.new_zeros(())
        own = own.view(-1, *[1] * (self.values.dim() - 1))
        shape = len(places), *self.values.shape[1:]
        (found,) = sum_over([torch.where(own, held, 0).expand(shape)], self.process_group)
        return found.split(counts)[place].clone()

    def step_(self, index: Tensor, gradient: Tensor) -> None:
        """One step of the optimizer on the rows ``index [n]``; a repeated index takes one step."""
        self.move(index.device)
        (index, gradient), _ = joined_rows([index, gradient.to(self._held["values"].dtype)], self.process_group)
        if self.duplicates == "last":
            last = last_of_each(index).view(-1, *[1] * (gradient.dim() - 1))
            gradient = torch.where(last, gradient, 0)
        found = found_inf([gradient], power=2)
        if self.sharded:
            own = index % world_size(self.process_group) == rank_in(self.process_group)
            index, gradient = index[own] // world_size(self.process_group), gradient[own]
        values, exp_avg, exp_avg_sq, steps = (self._held[name] for name in _NAMES)
        if self.optimizer != "masked_adam":
            gradient = _all_rows(values, index, gradient)
            index = torch.arange(len(values), device=values.device)
        if self.optimizer == "sgd":
            moved = values - self.lr * gradient
            if self.low is not None or self.high is not None:
                moved = moved.clamp(self.low, self.high)
            values.copy_(torch.where(found != 0, values, moved))
            return
        ops.masked_adam_(
            values,
            index,
            gradient,
            exp_avg,
            exp_avg_sq,
            steps,
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            low=self.low,
            high=self.high,
            found_inf=found,
        )

    def complete(self, name: str = "values") -> Tensor:
        """One of the four tensors with all rows. If they are sharded, every process must call it."""
        tensor: Tensor = getattr(self, name)
        if not self.sharded:
            return tensor
        world = world_size(self.process_group)
        (joined,), counts = joined_rows([tensor], self.process_group)
        found = joined.new_empty(self.num_rows, *joined.shape[1:])
        for rank, part in enumerate(joined.split(counts)):
            found[rank::world] = part
        return found

    def move(self, device: torch.device) -> None:
        """Move the table to where its rows are used."""
        if self._held["values"].device != device:
            self.to(device)

    def entries(self) -> dict[str, Tensor]:
        """The complete table, where it is sharded."""
        return {name: self.complete(name) for name in _NAMES} if self.sharded else {}

    def check_entries(self, state: Mapping[str, Any]) -> list[str]:
        """See :meth:`fastmeta.state.Stateful.check_entries`."""
        if not self.sharded:
            return []
        for name in _NAMES:
            entry(state, name, (self.num_rows, *getattr(self, name).shape[1:]), type(self).__name__)
        return list(_NAMES)

    def load_entries(self, entries: Mapping[str, Tensor]) -> None:
        """Take over this process's part."""
        for name, tensor in entries.items():
            getattr(self, name).copy_(self._own(tensor))

    def _own(self, tensor: Tensor) -> Tensor:
        """The rows of this process."""
        return tensor[rank_in(self.process_group) :: world_size(self.process_group)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if self.sharded:
            for name in _NAMES:
                setattr(self, name, self.keep_dtype(fn, getattr(self, name)))
        return self

    def _check(self, index: Tensor) -> None:
        # On a GPU the check would wait for the device.
        if index.is_cpu and len(index):
            low, high = int(index.min()), int(index.max())
            if low < 0 or high >= self.num_rows:
                bad = low if low < 0 else high
                raise IndexError(f"index must be places in the unlabeled set, in [0, {self.num_rows}), got {bad}")


def _all_rows(values: Tensor, index: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of the whole table ``[M]`` or ``[M, C]``: sums over rows that come again, 0 for all others."""
    rows = torch.zeros_like(values)
    # Each of the two adds in one order on its device, so that all processes find the same sums.
    return rows.index_add_(0, index, gradient) if rows.is_cpu else rows.index_put_((index,), gradient, accumulate=True)


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
