"""Residual networks for photographs."""

from torch import Tensor, nn

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}  # by depth


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)


class _Block(nn.Module):
    """Convolutions, each followed by its normalization, beside a shortcut. Attributes have torchvision's names."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(_convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def residual(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.residual(x) + (x if self.downsample is None else self.downsample(x)))


class _Basic(_Block):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__(inputs, width, stride)
        self.conv1, self.bn1 = _convolution(inputs, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _convolution(width, width, 3), nn.BatchNorm2d(width)

    def residual(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))


class _Bottleneck(_Block):
    """1x1, 3x3 and 1x1 convolutions; the 3x3 one has the stride ("v1.5")."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__(inputs, 4 * width, stride)
        self.conv1, self.bn1 = _convolution(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _convolution(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = _convolution(width, 4 * width, 1), nn.BatchNorm2d(4 * width)

    def residual(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.bn3(self.conv3(self.relu(self.bn2(self.conv2(x)))))


class ResNet(nn.Module):
    """ResNet-18, -34, -50 or -101 (He et al., 2016, Table 1), for images of about 224 pixels, and one layer ``fc``.

    From 50 on, blocks have three convolutions and the stride is that of the 3x3 one. Parameters have torchvision's
    names, so its state dicts load. ``fc`` sees D = 512 features, or 2048 from 50 on. Works in ``channels_last``.

    Args:
        num_classes: C.
        depth: 18, 34, 50 or 101.
        channels: image channels.

    Raises:
        ValueError: no such depth.

    >>> import torch
    >>> model = ResNet(num_classes=1000)
    >>> model(torch.zeros(2, 3, 64, 64)).shape, sum(p.numel() for p in model.parameters())
    (torch.Size([2, 1000]), 11689512)
    """

    def __init__(self, num_classes: int, *, depth: int = 18, channels: int = 3) -> None:
        super().__init__()
        if depth not in BLOCKS:
            raise ValueError(f"depth must be one of {', '.join(map(str, BLOCKS))}, got {depth}")
        self.conv1, self.bn1 = _convolution(channels, 64, 7, stride=2), nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        block: type[_Basic] | type[_Bottleneck] = _Bottleneck if depth >= 50 else _Basic
        inputs, groups = 64, []
        for group, count in enumerate(BLOCKS[depth]):
            width, blocks = 64 << group, []
            for place in range(count):
                blocks.append(block(inputs, width, stride=2 if group and not place else 1))
                inputs = width * block.expansion
            groups.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = groups
        self.fc = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """``[N, channels, height, width]`` to logits ``[N, C]``."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean(dim=(2, 3)))
