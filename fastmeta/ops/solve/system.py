"""The damped Hessian as a linear operator on ``[C, K]`` matrices, in what coordinates, and where its rows are.

Several processes may each hold rows of one system, and a copy of everything of the size of the solution. The Hessian is
a sum over the rows, so a product with it is the sum of the local ones: one all-reduce. A second moment, a dense Hessian
and the output factor are sums too. What is chosen from the number of rows is chosen from that of all processes, and so
as one process would with all the rows. The copies may differ in their last bits, by the number of threads or the kind
of machine. So nobody decides alone whether to go on: a process that does would wait for the others for ever.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastmeta.losses import LOSSES
from fastmeta.ops import hvp, process_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Relative difference up to which two copies of a norm are those of one vector: they differ by rounding alone.
SAME = 1e-6


class NotFiniteError(ValueError):
    """An argument of :func:`fastmeta.ops.solve_hessian` has numbers that are not finite."""


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
            tensors = "features, logits, rhs, weights and targets"
            raise NotFiniteError(f"{tensors} must be finite on every process, not on {other}")
        if abs(row[3] - every[0][3]) > SAME * every[0][3]:
            raise ValueError(
                "rhs_weight and rhs_bias must be the same on every process of process_group, their norm is "
                f"{every[0][3]:.6g} on 0 and {row[3]:.6g} on {other}"
            )
        for name, here, there in zip(settings, every[0][4:], row[4:], strict=True):
            if here != there:
                raise ValueError(f"{name} must be the same on every process of process_group, not so on {other}")
    return Joined(group, [int(row[0]) for row in every], any(row[1] for row in every), features.device)


class DampedHessian:
    """``X -> H X + damping X`` for the rows ``g_i`` of ``features``.

    Args:
        features: rows ``g_i`` with weight and bias input folded in, ``[N, K]``.
        logits: ``[N, C]``.
        signs: signs of the example weights ``[N]``; None if all are positive.
        loss: name of the loss.
        damping: added multiple of the identity.
        impl: implementation of the Hessian-vector product.
        joined: the processes whose rows make up the system; None if these are all rows.
        targets: ``[N, C]``, where the loss's curvature reads them.
    """

    def __init__(
        self,
        features: Tensor,
        logits: Tensor,
        signs: Tensor | None,
        loss: str,
        damping: float,
        impl: str | None,
        joined: Joined | None = None,
        targets: Tensor | None = None,
    ) -> None:
        self.features = features
        self.logits = logits
        self.targets = targets
        self.signs = signs
        self.loss = loss
        self.damping = damping
        self._kernel: Callable[..., Any] | None = hvp.OPERATOR.select(impl, features, logits, targets, signs)
        self.impl = impl
        self.joined = joined

    @property
    def num_rows(self) -> int:
        """``N``, of all processes."""
        return self.logits.shape[0] if self.joined is None else self.joined.count

    @property
    def may_be_indefinite(self) -> bool:
        """Whether a weight is negative; on a GPU, whether there are weights."""
        return self.signs is not None if self.joined is None else self.joined.negative

    @property
    def num_unknowns(self) -> tuple[int, int]:
        """``(C, K)``."""
        return self.logits.shape[1], self.features.shape[1]

    def __call__(self, direction: Tensor) -> Tensor:
        """``(H + damping I) V``. ``[C, K]``."""
        if self.joined is None:
            return self._of_own_rows(direction, self.damping)
        return self.joined.sum(self._of_own_rows(direction, 0.0))[0].add_(direction, alpha=self.damping)

    def carry(self, direction: Tensor, number: Tensor | float) -> tuple[Tensor, Tensor]:
        """``(H + damping I) V`` and, in the same all-reduce, the sum of a small integer over the processes."""
        assert self.joined is not None
        image, total = self.joined.sum(self._of_own_rows(direction, 0.0), direction.new_zeros(()).add_(number))
        return image.add_(direction, alpha=self.damping), total

    def _of_own_rows(self, direction: Tensor, damping: float) -> Tensor:
        if self._kernel is not None:
            code = LOSSES[self.loss]
            return self._kernel(self.features, self.logits, self.targets, direction, None, self.signs, code, damping)[0]
        return hvp.hessian_vector_product_reference(
            self.features, self.logits, direction, None, self.signs, self.loss, damping, self.targets
        )[0]

    def with_features(self, features: Tensor) -> "DampedHessian":
        """The same examples with their rows in another basis, ``[N, r]``."""
        return DampedHessian(
            features, self.logits, self.signs, self.loss, self.damping, self.impl, self.joined, self.targets
        )


def fold(weight: Tensor, bias: Tensor | None, *, padded: bool = False) -> Tensor:
    """Weight ``[C, D]`` and bias ``[C]`` side by side: ``[C, K]``; with zeros up to a multiple of 16 if ``padded``.

    A GPU reads rows that start at multiples of 16 bytes in whole words; a zero column is an unknown that stays 0.
    """
    if bias is None:
        return weight
    padding = [weight.new_zeros(len(weight), -(weight.shape[1] + 1) % 16)] if padded else []
    return torch.cat([weight, bias.unsqueeze(1), *padding], dim=1)


def rows(
    features: Tensor, weights: Tensor | None, bias: bool, *, on_device: bool = False
) -> tuple[Tensor, Tensor | None]:
    """``g_i = sqrt(|w_i|) [h_i, 1]`` ``[N, K]`` and the signs of the weights, None if all are positive ``[N]``.

    ``on_device``: padded like :func:`fold`, and nothing waits for the device to know whether a weight is negative.
    """
    g = fold(features, features.new_ones(len(features)), padded=on_device) if bias else features
    if weights is None:
        return g, None
    g = g * weights.abs().sqrt().unsqueeze(1)
    return g, weights.sign() if on_device or bool((weights < 0).any()) else None


class Coordinates(NamedTuple):
    """``x = y E + outside / damping``."""

    features: Tensor  # e_i, [N, r]
    basis: Tensor | None  # E [r, K]; None is the identity
    complete: bool  # whether E spans the whole space

    def inside(self, rhs: Tensor) -> Tensor:
        """The right-hand side in these coordinates. ``[C, r]``."""
        return rhs if self.basis is None else rhs @ self.basis.T

    def lift(self, solution: Tensor, rhs: Tensor, rhs_inside: Tensor, damping: float) -> Tensor:
        """Back to ``[C, K]``. With ``damping = 0`` the part outside, which no solution can meet, is left at 0."""
        if self.basis is None:
            return solution
        x = solution @ self.basis
        if not self.complete and damping > 0:
            x += (rhs - rhs_inside @ self.basis) / damping
        return x


def identity(features: Tensor) -> Coordinates:
    """The given coordinates."""
    return Coordinates(features, None, True)


def span(features: Tensor, joined: Joined | None = None) -> Coordinates:
    """N coordinates in the span of the rows, by ``G^T = Q R``; exact whatever the rank of ``G``.

    Every process takes the span of the rows of all: N x K numbers to exchange, fewer than their second moment has.
    """
    q, r = torch.linalg.qr((features if joined is None else joined.all_rows(features)).T)
    rows = r.T if joined is None else joined.own_rows(r.T)
    return Coordinates(rows.contiguous(), q.T, False)
