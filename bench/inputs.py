"""Inputs of the benchmarks, the same in every run."""

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fastmeta.models import WideResNet


class Shape(NamedTuple):
    """Examples, features, classes."""

    n: int
    d: int
    c: int

    def __str__(self) -> str:
        return f"{self.n}, {self.d}, {self.c}"


SHAPES = {
    "cpu": (Shape(64, 128, 10), Shape(256, 128, 10), Shape(768, 512, 200), Shape(1024, 2048, 1000)),
    "cuda": (
        Shape(256, 128, 10),
        Shape(448, 128, 100),
        Shape(768, 512, 200),
        Shape(1024, 2048, 1000),
        Shape(4096, 2048, 1000),
        Shape(1024, 768, 30522),
        Shape(8192, 2048, 128256),
    ),
}


@dataclass(frozen=True)
class LastLayer:
    """A last linear layer, a batch at its input, and a direction."""

    features: Tensor  # [N, D]
    head_weight: Tensor  # [C, D]
    head_bias: Tensor  # [C]
    logits: Tensor  # [N, C]
    targets: Tensor  # [N, C], rows sum to one
    weights: Tensor  # [N]
    direction_weight: Tensor  # [C, D]
    direction_bias: Tensor  # [C]

    def double(self) -> "LastLayer":
        return LastLayer(**{field.name: getattr(self, field.name).double() for field in fields(self)})


def last_layer(shape: Shape, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> LastLayer:
    n, d, c = shape
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    features, weight, bias = normal(n, d), normal(c, d) / math.sqrt(d), normal(c)
    return LastLayer(
        features=features.to(dtype),
        head_weight=weight.to(dtype),
        head_bias=bias.to(dtype),
        logits=functional.linear(features, weight, bias).to(dtype),
        targets=(2 * normal(n, c)).softmax(-1).to(dtype),
        weights=torch.rand(n, generator=generator, device=device).to(dtype),
        direction_weight=(normal(c, d) / math.sqrt(d)).to(dtype),
        direction_bias=normal(c).to(dtype),
    )


def power_law_features(shape: Shape, exponent: float = 0.75) -> tuple[Tensor, Tensor]:
    """Two batches ``[N, D]`` whose k-th standard deviation falls as ``k^-exponent``, along randomly rotated axes.

    The mean square of a feature is 1, as behind a normalization.
    """
    n, d, _ = shape
    generator = torch.Generator().manual_seed(0)
    deviations = torch.arange(1, d + 1, dtype=torch.float64).pow(-exponent)
    deviations *= math.sqrt(d) / deviations.norm()
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    batches = torch.randn(2, n, d, generator=generator, dtype=torch.float64) * deviations @ rotation.T
    return batches[0].float(), batches[1].float()


def resnet50() -> list[tuple[int, ...]]:
    """Shapes of ResNet-50's parameters: 161 tensors, 25.6 million numbers."""
    shapes: list[tuple[int, ...]] = []

    def conv(inputs: int, outputs: int, kernel: int) -> None:
        """Without bias, and the BatchNorm behind it."""
        shapes.extend([(outputs, inputs, kernel, kernel), (outputs,), (outputs,)])

    conv(3, 64, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            conv(inputs, width, 1)
            conv(width, width, 3)
            conv(width, 4 * width, 1)
            if block == 0:
                conv(inputs, 4 * width, 1)
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


# Shapes of the parameters: WRN-28-2 for 10 classes has 1.5 million numbers.
NETWORKS = {"WRN-28-2": lambda: [tuple(p.shape) for p in WideResNet(10).parameters()], "ResNet-50": resnet50}


def random_lists(network: str, count: int, device: str = "cpu") -> list[list[Tensor]]:
    """``count`` lists of tensors shaped as the network's parameters."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = [torch.Size(shape) for shape in NETWORKS[network]()]
    sizes = [shape.numel() for shape in shapes]
    lists = []
    for _ in range(count):
        parts = torch.randn(sum(sizes), generator=generator, device=device).split(sizes)
        # Each in memory of its own, as a network's parameters are.
        lists.append([part.reshape(shape).clone() for part, shape in zip(parts, shapes, strict=True)])
    return lists
