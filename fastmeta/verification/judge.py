"""Holds derivatives of the package against the two witnesses."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from fastmeta.problem.direction import Vector
from fastmeta.verification.witness import Differences, Witness, inner, relative

_MOST_TRIED = 24  # parameters that are looked at one by one


class Tolerance(NamedTuple):
    """The largest relative errors that are rounding."""

    backward: float  # against the user's own backward pass
    difference: float  # against differences, where those depend on the radius by less

    @staticmethod
    def of(dtype: torch.dtype) -> "Tolerance":
        """For a model whose logits have this dtype."""
        if dtype == torch.float64:
            return Tolerance(1e-7, 1e-5)
        return Tolerance(1e-3, 3e-2) if dtype == torch.float32 else Tolerance(0.15, 0.3)


class Reference(NamedTuple):
    """The derivative along one direction, by both witnesses."""

    direction: Vector
    differences: Differences | None  # D_v f [N, C]
    products: list[tuple[Tensor, float]]  # u [N, C] and <u, D_v f> by the user's own backward pass

    def by_backward(self, tangent: Tensor) -> float | None:
        """Error of ``D_v f [N, C]`` by the user's own backward pass; None if there is none."""
        return max((_gap(tangent, u, product) for u, product in self.products), default=None)

    def by_differences(self, tangent: Tensor) -> float | None:
        """Error of ``D_v f [N, C]`` by differences of the forward pass; None if they depend on the radius."""
        if self.differences is None or self.differences.error > 0.05:
            return None
        return relative(tangent, self.differences.value)


class Judge:
    """The witnesses of one model, and whether they agree with each other.

    Args:
        witness: of the model.
        differences: whether to take differences; else the user's own backward pass is the only witness.
    """

    def __init__(self, witness: Witness, *, differences: bool = True) -> None:
        self.witness = witness
        self.takes_differences = differences
        self.tolerance = Tolerance.of(witness.logits.dtype)
        self.generator = torch.Generator().manual_seed(0)
        logits = witness.logits
        noise = torch.randn(logits.shape, generator=self.generator, dtype=torch.float64).to(logits)
        self.no_backward = ""  # why there is no backward pass
        self.gradients: list[tuple[Tensor, Vector]] = []
        self.loss_gradient: Vector = {}
        try:
            self.gradients = [(u, witness.pulled_back(u)) for u in (witness.cotangent().to(logits), noise)]
            self.loss_gradient = witness.pulled_back(None)
        except Exception as error:
            self.gradients = []
            self.no_backward = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        everything = witness.random_direction(self.generator)
        self.references = {"a random direction": self.of(everything)}
        whole = {name: self.loss_gradient[name] for name in everything if name in self.loss_gradient}
        if whole and all(bool(value.isfinite().all()) for value in whole.values()) and inner(whole, whole) > 0:
            self.references["the gradient of a loss"] = self.of(whole)

    def of(self, direction: Vector) -> Reference:
        """What the witnesses say of a direction."""
        products = [(u, inner(gradient, direction)) for u, gradient in self.gradients]
        differences = self.witness.differences(direction) if self.takes_differences and self.repeats else None
        return Reference(direction, differences, products)

    @property
    def repeats(self) -> bool:
        """Whether two passes from the same state give the same logits, up to rounding."""
        return relative(self.witness.again, self.witness.logits) <= self.tolerance.backward / 10

    def allowance(self, reference: Reference) -> float:
        """How far from the differences a right derivative may be."""
        found = reference.differences
        return (
            self.tolerance.difference
            if found is None
            else max(self.tolerance.difference, 10 * found.error, 2 * found.kink)
        )

    @functools.cached_property
    def dispute(self) -> float | None:
        """By how much the two witnesses differ, where that is more than rounding."""
        gaps = []
        for reference in self.references.values():
            if reference.differences is not None and reference.by_differences(reference.differences.value) is not None:
                gap = reference.by_backward(reference.differences.value)
                if gap is not None and gap > self.allowance(reference):
                    gaps.append(gap)
        return max(gaps, default=None)

    def disputed_parameters(self) -> tuple[list[str], list[str]]:
        """Parameters whose derivative the user's own backward pass has otherwise than differences.

        Returns:
            Those that it does not reach at all, and the others.
        """
        direction = self.references["a random direction"].direction
        reached = self.gradients[0][1]
        missing = [name for name in direction if name not in reached and self._is_disputed({name: direction[name]})]
        wrong = [name for name in list(reached)[:_MOST_TRIED] if self._is_disputed({name: direction[name]})]
        return missing, wrong

    def _is_disputed(self, direction: Vector) -> bool:
        reference = self.of(direction)
        assert reference.differences is not None
        gap = reference.by_backward(reference.differences.value) or 0.0
        size = self.references["a random direction"].differences
        assert size is not None
        share = (reference.differences.value.norm() / size.value.norm().clamp_min(1e-30)).item()
        return gap > 3 * self.allowance(reference) and share > self.tolerance.difference


def _gap(tangent: Tensor, cotangent: Tensor, product: float) -> float:
    """``|<u, z> - product|``, relative to what such a product has for a random u."""
    u, z = cotangent.double(), tangent.double()
    found = (u * z).sum().item()
    typical = (u.norm() * z.norm()).item() / max(u.numel(), 1) ** 0.5
    gap = abs(found - product)
    if gap != gap:
        return float("inf")
    return gap / max(abs(product), typical, 1e-30) if gap > 1e-30 else 0.0
