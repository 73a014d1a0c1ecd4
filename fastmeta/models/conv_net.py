"""A small convolutional net for small images."""

from torch import Tensor, nn


class ConvNet(nn.Module):
    """Three 3x3 convolutions with batch normalization, global average pooling, and one linear layer ``fc``.

    Args:
        channels: image channels.
        num_classes: C.
        width: channels of the first convolution; the other two have twice as many, which is also D, the number of
            features that ``fc`` sees.

    >>> import torch
    >>> ConvNet(channels=1, num_classes=10)(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(self, channels: int, num_classes: int, width: int = 32) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
            convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
            return [convolution, nn.BatchNorm2d(outputs), nn.LeakyReLU(0.1, inplace=True)]

        self.body = nn.Sequential(
            *block(channels, width, 1),
            *block(width, 2 * width, 2),
            *block(2 * width, 2 * width, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.fc = nn.Linear(2 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """``[N, channels, height, width]`` to logits ``[N, C]``."""
        return self.fc(self.body(images))
