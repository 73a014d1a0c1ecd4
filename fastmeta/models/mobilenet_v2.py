"""A small network for photographs, for which ImageNet weights are at hand."""

from torch import Tensor, nn

# Expansion of the channels inside a block, channels, blocks, stride of the first (Sandler et al., 2018, Table 2).
TABLE = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def _layer(inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))


class _InvertedResidual(nn.Module):
    """1x1 to more channels, 3x3 of each channel alone, 1x1 to fewer; a shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, *, stride: int, expansion: int) -> None:
        super().__init__()
        inside = inputs * expansion
        widened = [] if expansion == 1 else [_layer(inputs, inside, 1)]
        self.conv = nn.Sequential(
            *widened,
            _layer(inside, inside, 3, stride=stride, groups=inside),
            nn.Conv2d(inside, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.has_shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.has_shortcut else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 (Sandler et al., 2018) for images of about 224 pixels: 3.5 million parameters.

    One linear layer, ``classifier[1]``, on D = 1280 features. Parameters have torchvision's names, so its state dicts
    load. Works in ``channels_last`` as well.

    Args:
        num_classes: C.
        channels: image channels.
        dropout: of the features, in training.

    >>> import torch
    >>> model = MobileNetV2(num_classes=1000)
    >>> model(torch.zeros(2, 3, 64, 64)).shape, sum(p.numel() for p in model.parameters())
    (torch.Size([2, 1000]), 3504872)
    """

    def __init__(self, num_classes: int, *, channels: int = 3, dropout: float = 0.2) -> None:
        super().__init__()
        inputs = 32
        blocks: list[nn.Module] = [_layer(channels, inputs, 3, stride=2)]
        for expansion, outputs, count, stride in TABLE:
            for place in range(count):
                blocks.append(_InvertedResidual(inputs, outputs, stride=1 if place else stride, expansion=expansion))
                inputs = outputs
        self.features = nn.Sequential(*blocks, _layer(inputs, 1280, 1))
        layer = nn.Linear(1280, num_classes)
        self.classifier = nn.Sequential(nn.Dropout(dropout), layer)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        nn.init.normal_(layer.weight, 0, 0.01)
        nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        """``[N, channels, height, width]`` to logits ``[N, C]``."""
        return self.classifier(self.features(images).mean(dim=(2, 3)))
