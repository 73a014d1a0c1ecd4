"""The residual network of ImageNet at 72 pixels."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class _Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters: halved by averaging, the new channels zero."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.halves = inputs != outputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=2 if self.halves else 1, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x)))))
        if self.halves:
            # an odd side rounds up, as the convolution's does
            x = functional.avg_pool2d(x, 2, ceil_mode=True)
            x = torch.cat([x, torch.zeros_like(x)], dim=1)
        return functional.relu(y + x)


class ResNet26(nn.Module):
    """ResNet-26 of Rebuffi, Bilen and Vedaldi (2017), for crops of 64 from images of 72 pixels: 6.1 million parameters.

    Learning to Impute's network on ImageNet. As in their published code: a 3x3 convolution to 32 channels with
    normalization but no activation, three groups of four blocks with 64, 128 and 256 channels, each group halving the
    image with a shortcut of averages and zero channels, a last normalization and activation, average pooling, and one
    linear layer ``fc`` on D = 256 features. Works in ``channels_last`` as well.

    Args:
        num_classes: C.
        channels: image channels.

    >>> import torch
    >>> model = ResNet26(num_classes=1000)
    >>> model(torch.zeros(2, 3, 64, 64)).shape, sum(p.numel() for p in model.parameters())
    (torch.Size([2, 1000]), 6071688)
    """

    def __init__(self, num_classes: int, *, channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 32, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        blocks, inputs = [], 32
        for outputs in (64, 128, 256):
            for _ in range(4):
                blocks.append(_Block(inputs, outputs))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.last_norm = nn.BatchNorm2d(256)
        self.fc = nn.Linear(256, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """``[N, channels, height, width]`` to logits ``[N, C]``."""
        x = self.blocks(self.norm(self.stem(images)))
        return self.fc(functional.relu(self.last_norm(x)).mean(dim=(2, 3)))
