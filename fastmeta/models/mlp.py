"""Fully connected nets."""

from collections.abc import Sequence

from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers with ReLU between them; the last, ``fc``, gives the logits.

    ``MLP(2, 2, [100])`` is the net of Not All Unlabeled Data Are Equal on circles and moons, ``MLP(50, 5, [128] * 3)``
    that of Label Gradient Alignment on spheres.

    Args:
        inputs: numbers of an example; more dimensions are flattened.
        outputs: C.
        hidden: width of each hidden layer.

    >>> import torch
    >>> model = MLP(50, 5, [128] * 3)
    >>> model(torch.zeros(2, 50)).shape, sum(p.numel() for p in model.parameters())
    (torch.Size([2, 5]), 40197)
    """

    def __init__(self, inputs: int, outputs: int, hidden: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        for width in hidden:
            layers += [nn.Linear(inputs, width), nn.ReLU()]
            inputs = width
        self.body = nn.Sequential(*layers)
        self.fc = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, ...]`` to logits ``[N, C]``."""
        return self.fc(self.body(x))
