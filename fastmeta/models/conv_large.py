"""The 13-layer convolutional net of semi-supervised learning on 32-pixel images."""

from typing import Literal

import torch
from torch import Tensor, nn

SLOPE = 0.1  # of the leaky ReLU
MIN_SIZE = 12  # pixels: two poolings leave 3 for the convolution without padding


class ConvLarge(nn.Module):
    """The 13-layer net of Laine and Aila (2017, Table 5) and Tarvainen and Valpola (2017): 3.1 million parameters.

    Three 3x3 convolutions with 128 channels, three with 256, then one without padding to 512 channels and two 1x1 to
    256 and 128, average pooling, and one linear layer ``fc`` on D = 128 features. Each convolution is followed by batch
    normalization and a leaky ReLU of slope 0.1; max pooling and dropout of whole channels follow the first and the
    second three. As Meta-Gradient used it: no Gaussian noise on the images, no normalization after ``fc``. Works in
    ``channels_last`` as well.

    Laine and Aila, and Tarvainen and Valpola, have ``noise=0.15, dropped="values"``; virtual adversarial training
    (Miyato et al., 2018) and Learning to Impute's first version normalize the logits: ``top_norm=True``, with which no
    linear layer gives the logits, so that methods of the last layer refuse it.

    Args:
        num_classes: C.
        channels: image channels.
        dropout: probability that a channel, or a value, is left out, in both places.
        dropped: what dropout leaves out.
        noise: standard deviation of Gaussian noise on the images in training.
        top_norm: batch normalization of what ``fc`` gives.

    Raises:
        ValueError: images smaller than 12 pixels (from ``forward``).

    >>> import torch
    >>> model = ConvLarge(num_classes=10)
    >>> model(torch.zeros(2, 3, 32, 32)).shape, sum(p.numel() for p in model.parameters())
    (torch.Size([2, 10]), 3121802)
    """

    def __init__(
        self,
        num_classes: int,
        *,
        channels: int = 3,
        dropout: float = 0.5,
        dropped: Literal["channels", "values"] = "channels",
        noise: float = 0.0,
        top_norm: bool = False,
    ) -> None:
        super().__init__()
        self.noise = noise

        def block(inputs: int, outputs: int, kernel: int = 3, padding: int = 0) -> list[nn.Module]:
            # no bias: the normalization takes it away again
            convolution = nn.Conv2d(inputs, outputs, kernel, padding=padding, bias=False)
            return [convolution, nn.BatchNorm2d(outputs), nn.LeakyReLU(SLOPE, inplace=True)]

        drop = nn.Dropout2d if dropped == "channels" else nn.Dropout

        def three_blocks(inputs: int, outputs: int) -> list[nn.Module]:
            widths = [(inputs, outputs), (outputs, outputs), (outputs, outputs)]
            blocks = [layer for width in widths for layer in block(*width, padding=1)]
            return [*blocks, nn.MaxPool2d(2), drop(dropout)]

        self.body = nn.Sequential(
            *three_blocks(channels, 128),
            *three_blocks(128, 256),
            *block(256, 512),
            *block(512, 256, kernel=1),
            *block(256, 128, kernel=1),
        )
        self.fc = nn.Linear(128, num_classes)
        self.top_norm = nn.BatchNorm1d(num_classes) if top_norm else None
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=SLOPE, mode="fan_out", nonlinearity="leaky_relu")
        nn.init.xavier_normal_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        """``[N, channels, height, width]`` to logits ``[N, C]``."""
        height, width = images.shape[-2:]
        if min(height, width) < MIN_SIZE:
            raise ValueError(f"images must have at least {MIN_SIZE} x {MIN_SIZE} pixels, got {height} x {width}")
        if self.noise and self.training:
            images = images + self.noise * torch.randn_like(images)
        logits = self.fc(self.body(images).mean(dim=(2, 3)))
        return logits if self.top_norm is None else self.top_norm(logits)
