"""The network of facial landmarks."""

from torch import Tensor, nn

MIN_SIZE = 44  # pixels: three poolings leave 3 for the last convolution


class TCDCN(nn.Module):
    """The net of Zhang et al. (2014) as Learning to Impute's code has it: 285,586 parameters for images of 60 pixels.

    Gray images of 60 pixels; convolutions without padding of 5x5, 5x5, 3x3 and 3x3 to 20, 48, 64 and 80 channels, each
    with a tanh that is cut off straight at -1 and 1, the first three with 2x2 max pooling; then a linear layer ``body``
    gives D = 256 features and another, ``fc``, two numbers for each of five landmarks. The code has dropout between the
    two for unlabeled images alone; here there is none.

    Args:
        outputs: numbers to predict.
        channels: image channels.
        image_size: height and width.

    Raises:
        ValueError: the images are too small for the poolings.

    >>> import torch
    >>> model = TCDCN()
    >>> model(torch.zeros(2, 1, 60, 60)).shape, sum(p.numel() for p in model.parameters())
    (torch.Size([2, 10]), 285586)
    """

    def __init__(self, outputs: int = 10, *, channels: int = 1, image_size: int = 60) -> None:
        super().__init__()
        if image_size < MIN_SIZE:
            raise ValueError(f"image_size must be at least {MIN_SIZE} for tcdcn, got {image_size}")
        layers: list[nn.Module] = []
        side = image_size
        for inputs, width, kernel in ((channels, 20, 5), (20, 48, 5), (48, 64, 3)):
            layers += [nn.Conv2d(inputs, width, kernel), nn.Hardtanh(), nn.MaxPool2d(2)]
            side = (side - kernel + 1) // 2
        layers += [nn.Conv2d(64, 80, 3), nn.Hardtanh(), nn.Flatten(), nn.Linear(80 * (side - 2) ** 2, 256)]
        self.body = nn.Sequential(*layers)
        self.fc = nn.Linear(256, outputs)

    def forward(self, images: Tensor) -> Tensor:
        """``[N, channels, height, width]`` to ``[N, outputs]``."""
        return self.fc(self.body(images))
