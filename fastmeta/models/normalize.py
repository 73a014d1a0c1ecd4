"""The normalization of a net's input, inside the model: nothing else has to know it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation that most ImageNet weights expect."""
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
"""Of CIFAR-10's training images, which codes use for CIFAR-100 and SVHN as well."""
SYMMETRIC = ((0.5,), (0.5,))
"""[0, 1] becomes [-1, 1], as FixMatch and its successors have it."""


class Normalized(nn.Module):
    """A net behind the normalization of its input: ``net((images - mean) / std)``.

    Where there is a mean for each of three channels, gray images are given to all three.

    Args:
        net: takes ``[N, channels, height, width]``.
        mean: of each channel, or one for all.
        std: standard deviation, likewise.

    >>> model = Normalized(nn.Identity(), (0.5,), (0.25,))
    >>> model(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)).flatten()
    tensor([-2.,  2.])
    """

    def __init__(self, net: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        """``[N, channels, height, width]`` in [0, 1] to what the net gives, logits ``[N, C]``."""
        return self.net((images - self.mean) / self.std)
