"""Wide residual networks, the usual ones of semi-supervised learning on 32-pixel images."""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

SLOPE = 0.1  # of the leaky ReLU


class _Block(nn.Module):
    """Two 3x3 convolutions, each behind its normalization and activation, beside a shortcut.

    A shortcut that is a convolution sees what the first activation gives where ``shared``, else the block's input.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, bias: bool, shared: bool) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=bias)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=bias)
        self.shared = shared
        self.shortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        activated = functional.leaky_relu(self.norm1(x), SLOPE)
        y = self.conv2(functional.leaky_relu(self.norm2(self.conv1(activated)), SLOPE))
        return y + (x if self.shortcut is None else self.shortcut(activated if self.shared else x))


class WideResNet(nn.Module):
    """WRN-depth-width (Zagoruyko and Komodakis, 2016) with leaky ReLU of slope 0.1, and one linear layer ``fc``.

    The default is WRN-28-2, with 1.5 million parameters: the network of FixMatch and of the papers behind the methods.
    It has three groups of ``(depth - 4) / 6`` blocks with ``16 width``, ``32 width`` and ``64 width`` channels; the
    last is D, the number of features that ``fc`` sees. Works in ``channels_last`` as well.

    Codes differ in small things. That of Oliver et al. (2018), from which MixMatch's, FixMatch's and others' come, has
    ``momentum=0.001, eps=0.001, shared="first"``: statistics remember a thousand batches, and only the first of the
    three shortcuts sees activated features. Learning to Impute's has, besides, ``bias=True``.

    Args:
        num_classes: C.
        depth: convolutions along the longest path; 6 k + 4.
        width: factor of the channels.
        channels: image channels.
        bias: whether convolutions have one.
        momentum: of the normalizations' running statistics, the share of a batch.
        eps: of the normalizations.
        shared: which shortcuts that are convolutions see activated features: all, or that of the first group.

    Raises:
        ValueError: no such depth.

    >>> import torch
    >>> model = WideResNet(num_classes=10)
    >>> model(torch.zeros(2, 3, 32, 32)).shape, sum(p.numel() for p in model.parameters())
    (torch.Size([2, 10]), 1467610)
    """

    def __init__(
        self,
        num_classes: int,
        *,
        depth: int = 28,
        width: int = 2,
        channels: int = 3,
        bias: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
        shared: Literal["all", "first"] = "all",
    ) -> None:
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"depth must be 6 k + 4 with k >= 1, got {depth}")
        self.stem = nn.Conv2d(channels, 16, 3, padding=1, bias=bias)
        blocks, inputs = [], 16
        for group, outputs in enumerate((16 * width, 32 * width, 64 * width)):
            for place in range((depth - 4) // 6):
                stride = 2 if group and not place else 1
                blocks.append(_Block(inputs, outputs, stride, bias, shared == "all" or group == 0))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(inputs)
        self.fc = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=SLOPE, mode="fan_out", nonlinearity="leaky_relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                module.momentum, module.eps = momentum, eps
        nn.init.xavier_normal_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        """``[N, channels, height, width]`` to logits ``[N, C]``."""
        x = functional.leaky_relu(self.norm(self.blocks(self.stem(images))), SLOPE)
        return self.fc(x.mean(dim=(2, 3)))
