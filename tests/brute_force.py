"""The last layer's inner and outer problem by plain autograd, in float64: the yardstick of the methods' tests.

Nothing here uses fastmeta's closed forms: losses are written out, an inner SGD step is differentiated through.
"""

from dataclasses import dataclass

import torch
from cases import Draw
from torch import Tensor
from torch.nn import functional

from fastmeta import Outputs


def per_example(f: Tensor, y: Tensor, loss: str) -> Tensor:
    """``l(f_i, y_i)``. ``[N]``."""
    if loss == "cross_entropy":
        return -(y * functional.log_softmax(f, -1)).sum(-1)
    if loss == "binary_cross_entropy":
        return -(y * functional.logsigmoid(f) + (1 - y) * functional.logsigmoid(-f)).sum(-1)
    if loss == "huber":
        gap = (f - y).abs()  # functional.huber_loss has no forward mode
        return torch.where(gap <= 1, gap.square() / 2, gap - 0.5).sum(-1)
    if loss == "mse_tanh":
        return (f.tanh() - y.tanh()).pow(2).sum(-1)
    prediction = {"mse": lambda f: f, "mse_probs": lambda f: functional.softmax(f, -1)}[loss](f)
    return (prediction - y).pow(2).sum(-1)


def reduced(f: Tensor, y: Tensor, loss: str, weights: Tensor | None = None, reduction: str = "mean") -> Tensor:
    values = per_example(f, y, loss)
    values = values if weights is None else weights * values
    return values.mean() if reduction == "mean" else values.sum()


Parameters = tuple[Tensor, Tensor | None]  # weight [C, D], bias [C]


@dataclass
class Layer:
    """A last layer with unlabeled and hold-out examples."""

    weight: Tensor
    bias: Tensor | None
    features_u: Tensor
    features_h: Tensor
    classes: Tensor  # [Nh]

    @property
    def parameters(self) -> Parameters:
        return self.weight, self.bias

    @property
    def num_classes(self) -> int:
        return len(self.weight)

    @property
    def targets(self) -> Tensor:
        return torch.eye(self.num_classes, dtype=self.weight.dtype)[self.classes]

    @property
    def unlabeled(self) -> Outputs:
        return self.outputs(self.features_u)

    @property
    def holdout(self) -> Outputs:
        return self.outputs(self.features_h)

    def outputs(self, features: Tensor) -> Outputs:
        return Outputs(features, functional.linear(features, self.weight, self.bias), self.weight, self.bias)

    def batch(self) -> dict[str, Outputs | Tensor]:
        """What every ``refine`` takes."""
        return {"unlabeled": self.unlabeled, "holdout": self.holdout, "targets": self.classes}

    def outer(self, parameters: Parameters, loss: str = "cross_entropy") -> Tensor:
        return reduced(functional.linear(self.features_h, *parameters), self.targets, loss)

    def gradient(self, value: Tensor, parameters: Parameters, create_graph: bool = False) -> Parameters:
        given = [p for p in parameters if p is not None]
        grads = torch.autograd.grad(value, given, create_graph=create_graph)
        return (grads[0], grads[1] if len(grads) > 1 else None)

    def step(self, parameters: Parameters, direction: Parameters, rate: float) -> Parameters:
        weight, bias = (
            None if p is None or d is None else p - rate * d for p, d in zip(parameters, direction, strict=True)
        )
        return weight, bias

    def inner_step(
        self,
        labels: Tensor,
        *,
        rate: float,
        loss: str,
        reduction: str = "mean",
        weights: Tensor | None = None,
        labeled_weight: float = 0.0,
    ) -> Parameters:
        """Theta after one step of SGD on the unlabeled loss, differentiable in labels and weights."""
        value = reduced(functional.linear(self.features_u, *self.parameters), labels, loss, weights, reduction)
        if labeled_weight:
            f = functional.linear(self.features_h, *self.parameters)
            value = value + labeled_weight * reduced(f, self.targets, "cross_entropy", None, reduction)
        return self.step(self.parameters, self.gradient(value, self.parameters, create_graph=True), rate)


def make_layer(draw: Draw, shape: tuple[int, int, int] = (6, 5, 4), holdout: int = 7, bias: bool = True) -> Layer:
    n, d, c = shape
    return Layer(
        weight=draw.normal(c, d).requires_grad_(),
        bias=draw.normal(c).requires_grad_() if bias else None,
        features_u=draw.normal(n, d),
        features_h=draw.normal(holdout, d),
        classes=draw.classes(holdout, c),
    )


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    """Relative error, in the norm of the whole tensor."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    error = float((actual.detach() - expected.detach()).norm())
    assert error <= tolerance * float(expected.detach().norm()) + 1e-15, error
