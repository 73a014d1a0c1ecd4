"""What is trained: a network, a batch of random images, and the loop around them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmeta.models import ConvLarge, WideResNet

NUM_CLASSES = 10
UNLABELED = 50_000  # images in the unlabeled set, for the methods with a table


@dataclass(frozen=True)
class Network:
    """A network and the size of the images it is fed."""

    name: str
    make: Callable[[], nn.Module]
    pixels: int = 32


NETWORKS = (
    Network("WRN-28-2", lambda: WideResNet(NUM_CLASSES)),
    Network("ConvLarge", lambda: ConvLarge(NUM_CLASSES)),
)


@dataclass(frozen=True)
class Batch:
    """One step's images: labeled ones, and two views of unlabeled ones."""

    labeled: Tensor  # [B_l, 3, height, width]
    targets: Tensor  # [B_l]
    weak: Tensor  # [B_u, 3, height, width]
    strong: Tensor  # [B_u, 3, height, width]
    index: Tensor  # [B_u], places of the unlabeled images in their set


def random_batch(size: int, pixels: int, dtype: torch.dtype = torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(0)

    def images() -> Tensor:
        return torch.randn(size, 3, pixels, pixels, generator=generator).to(dtype)

    targets = torch.randint(NUM_CLASSES, (size,), generator=generator)
    return Batch(images(), targets, images(), images(), torch.randperm(UNLABELED, generator=generator)[:size])


class Step:
    """One step of a training loop with every call; the model's ``.grad`` stay until the next.

    Subclasses say what the step is. The settings cost what any others would; the rates are small, because the images
    are noise and the loss has to stay finite.
    """

    def __init__(self, network: Network, batch: Batch) -> None:
        torch.manual_seed(0)
        self.model = network.make().to(batch.labeled.dtype)
        self.batch = batch
        self.optimizer = self.make_optimizer()

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)

    def labeled_loss(self) -> Tensor:
        return functional.cross_entropy(self.model(self.batch.labeled), self.batch.targets)

    def gradient(self) -> dict[str, Tensor]:
        """What the last backward has left, by name."""
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}

    def __call__(self) -> Tensor:
        """The step; its loss, detached."""
        raise NotImplementedError


def squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    """``mean_i |softmax(f_i) - z_i|^2``."""
    return (logits.softmax(1) - labels).square().sum(1).mean()
