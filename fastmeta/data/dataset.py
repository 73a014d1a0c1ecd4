"""A labeled image collection held in memory."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageDataset:
    """Images with their classes.

    Args:
        name: what reports call it.
        images: ``[M, channels, height, width]``, float32 in [0, 1].
        targets: ``[M]``, int64 classes.
        num_classes: C.

    Raises:
        ValueError: the shapes, dtypes or ranges are not these.

    >>> ImageDataset("two", torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]), 2).image_shape
    (1, 8, 8)
    """

    name: str
    images: Tensor
    targets: Tensor
    num_classes: int

    def __post_init__(self) -> None:
        if self.images.dim() != 4 or not self.images.is_floating_point():
            raise ValueError(
                f"images must be floating point [M, channels, height, width], got {self.images.dtype} "
                f"{list(self.images.shape)}"
            )
        if self.targets.dtype != torch.int64 or self.targets.shape != self.images.shape[:1]:
            raise ValueError(
                f"targets must be int64 [{self.images.shape[0]}], got {self.targets.dtype} {list(self.targets.shape)}"
            )
        if len(self.targets) and not 0 <= int(self.targets.min()) <= int(self.targets.max()) < self.num_classes:
            raise ValueError(f"targets must lie in [0, {self.num_classes}), got up to {int(self.targets.max())}")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(channels, height, width)``."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device | str) -> "ImageDataset":
        """The same dataset on ``device``."""
        return ImageDataset(self.name, self.images.to(device), self.targets.to(device), self.num_classes)
