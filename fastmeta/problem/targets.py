"""Targets as rows of the logits: what fits them, token targets, and the rows that are left out."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmeta import checks, losses


class Given(NamedTuple):
    """The arguments of a call that must have a row for each row of the model's unlabeled logits."""

    rows: Mapping[str, Tensor]  # [N] or [N, C] by the argument's name
    view: str = "unlabeled"  # the argument that the model runs on

    def check(self, logits: Tensor) -> None:
        """Raise ValueError unless they fit the logits ``[N, C]``."""
        for name, value in self.rows.items():
            if len(value) != len(logits):
                raise ValueError(_not_as_many(name, logits, self.view, value))
            if value.dim() == 2 and value.shape != logits.shape:
                shapes = f"[N, C] = {list(logits.shape)} like the model's logits for {self.view}"
                raise ValueError(f"{name} must be {shapes}, got {list(value.shape)}")


NOTHING_GIVEN = Given({})


class Kept(NamedTuple):
    """Targets whose rows of class -100 are left out of a loss, and of the number of examples that its mean is over."""

    targets: Tensor  # [N, C], or classes [N] with 0 in the rows that are left out
    weights: Tensor | None  # [N], 0 in those rows, else 1; None means 1
    number: int | Tensor  # of the other rows; a tensor where no host may wait for it


def kept(targets: Tensor, dtype: torch.dtype) -> Kept:
    """What ``torch.nn.functional.cross_entropy`` takes of such targets, ``ignore_index=-100``.

    >>> kept(torch.tensor([2, -100, 0]), torch.float32)
    Kept(targets=tensor([2, 0, 0]), weights=tensor([1., 0., 1.]), number=tensor(2))
    """
    if targets.dtype != torch.int64:
        return Kept(targets, None, len(targets))
    # On a GPU, or in a graph, nobody can look whether there are any.
    if targets.is_cpu and not torch.compiler.is_compiling() and (not len(targets) or int(targets.min()) >= 0):
        return Kept(targets, None, len(targets))
    there = targets != checks.IGNORED
    return Kept(targets * there, there.to(dtype), there.sum())


def as_rows(targets: Any, count: int) -> Any:
    """Token targets, ``[B, T]`` or ``[B, T, C]``, flattened to the rows of N logits; anything else as it is."""
    if isinstance(targets, Tensor) and targets.is_floating_point() and targets.dim() > 2:
        return targets.flatten(0, -2)
    if isinstance(targets, Tensor) and targets.dtype == torch.int64 and targets.dim() > 1 and targets.numel() == count:
        return targets.flatten()
    return targets


def check_targets(targets: object, logits: Tensor, name: str, view: str | None = None) -> Tensor:
    """Targets ``[N]`` or ``[N, C]`` that fit logits ``[N, C]``, of the model for one of its views, in their dtype."""
    rows = as_rows(targets, len(logits))
    if view is not None and isinstance(rows, Tensor) and len(rows) != len(logits):
        raise ValueError(_not_as_many(name, logits, view, rows))
    if isinstance(rows, Tensor) and rows.is_floating_point():
        rows = rows.detach().to(logits.dtype)
    return checks.targets(rows, logits, logits.shape[1], name, ignored=True)


def read(targets: Tensor, logits: Tensor, loss: str, name: str = "targets", view: str | None = None) -> Kept:
    """Targets of logits ``[N, C]``, checked, as probabilities ``[N, C]`` in their dtype.

    Args:
        targets: int64 classes ``[N]`` or probabilities ``[N, C]``; of tokens ``[B, T]``, ``[B, T, C]``.
        logits: that they are for.
        loss: that they are targets of.
        name: of the argument.
        view: the argument that the model has made the logits of; None: they were given.
    """
    checked = check_targets(targets, logits, name, view)
    checks.classes_of(checked, logits.shape[1], losses.of(loss), name)
    rows, weights, number = kept(checked, logits.dtype)
    return Kept(losses.as_probabilities(rows, logits.shape[1], logits.dtype), weights, number)


def probabilities(targets: Tensor, logits: Tensor, loss: str) -> Tensor:
    """See :func:`read`; a row of class -100 is 0. ``[N, C]``."""
    y, weights, _ = read(targets, logits, loss)
    return y if weights is None else y * weights.unsqueeze(1)


def _not_as_many(name: str, logits: Tensor, view: str, value: Tensor) -> str:
    return f"{name} must have N = {len(logits)} like the rows of the model's logits for {view}, got {len(value)}"
