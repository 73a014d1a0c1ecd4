"""What is trained: a network, a batch of random images, and the loop around them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import fastmeta
from fastmeta.models import ConvLarge, WideResNet

UNLABELED = 50_000  # images in the unlabeled set, for the methods with a table


@dataclass(frozen=True)
class Network:
    """A network and the images of a step: their sizes, and how many are labeled and unlabeled."""

    name: str
    make: Callable[[], nn.Module]
    pixels: int = 32
    labeled: int = 16
    unlabeled: int = 16
    num_classes: int = 10

    def __str__(self) -> str:
        return f"{self.name}, {self.pixels} px, B {self.labeled} + {self.unlabeled}"


def resnet50() -> nn.Module:
    from torchvision.models import resnet50 as make  # where it is installed

    return make(num_classes=1000)


NETWORKS = {
    "cpu": (Network("WRN-28-2", lambda: WideResNet(10)), Network("ConvLarge", lambda: ConvLarge(10))),
    "cuda": (
        Network("WRN-28-2", lambda: WideResNet(10), labeled=64, unlabeled=448),
        Network("ResNet-50", resnet50, 224, 64, 320, 1000),
    ),
}


@dataclass(frozen=True)
class Images:
    """One step's images: labeled ones, and two views of unlabeled ones."""

    labeled: Tensor  # [B_l, 3, height, width]
    targets: Tensor  # [B_l]
    weak: Tensor  # [B_u, 3, height, width]
    strong: Tensor  # [B_u, 3, height, width]
    index: Tensor  # [B_u], places of the unlabeled images in their set


def random_batch(network: Network, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Images:
    """Noise; on a GPU in the memory format that its convolutions want."""
    generator = torch.Generator(device).manual_seed(0)

    def images(count: int) -> Tensor:
        shape = (count, 3, network.pixels, network.pixels)
        return on_device(torch.randn(shape, generator=generator, device=device).to(dtype), device)

    targets = torch.randint(network.num_classes, (network.labeled,), generator=generator, device=device)
    index = torch.randperm(UNLABELED, generator=generator, device=device)[: network.unlabeled]
    return Images(images(network.labeled), targets, images(network.unlabeled), images(network.unlabeled), index)


def on_device(what: Any, device: str) -> Any:
    """Images or a model, on a GPU with the channels last."""
    return what.to(device, memory_format=torch.channels_last) if device == "cuda" else what.to(device)


class Step:
    """One step of a training loop with every call; the model's ``.grad`` stay until the next.

    Subclasses say what loss the step descends. The settings cost what any others would; the rates are small, because
    the images are noise and the loss has to stay finite.
    """

    method: Any = None  # of fastmeta, where the step has one

    def __init__(self, network: Network, batch: Images) -> None:
        torch.manual_seed(0)
        self.device = batch.labeled.device.type
        self.model: nn.Module = on_device(network.make().to(batch.labeled.dtype), self.device)
        self.batch = batch
        self.num_classes = network.num_classes
        self.optimizer = self.make_optimizer()

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)

    def __call__(self) -> Tensor:
        """The step; its loss, detached."""
        return self.descend(self.loss)

    def loss(self) -> Tensor:
        raise NotImplementedError

    def descend(self, loss: Callable[[], Tensor], inputs: Sequence[Tensor] | None = None) -> Tensor:
        """One update along the loss's gradient in ``inputs``, all parameters if None."""
        self.optimizer.zero_grad()
        value = loss()
        value.backward(inputs=inputs)
        self.update()
        return value.detach()

    def update(self) -> None:
        self.optimizer.step()

    def labeled_loss(self) -> Tensor:
        return functional.cross_entropy(self.model(self.batch.labeled), self.batch.targets)

    def gradient(self) -> dict[str, Tensor]:
        """What the last backward has left, by name."""
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}

    def refine_outputs(self, tape: Any, unlabeled: Tensor, labeled: Tensor, **more: Any) -> fastmeta.Refined:
        """The method on outputs of passes that were captured."""
        holdout = {"holdout": tape.outputs(labeled), "targets": self.batch.targets}
        return self.method.refine(unlabeled=tape.outputs(unlabeled), **holdout, **more)

    def refine_model(self, unlabeled: Tensor, **more: Any) -> fastmeta.Refined:
        """The method on the model and images, by passes of its own; the hold-out examples are the labeled ones."""
        if "holdout_gradient" not in more:
            more |= {"holdout": self.batch.labeled, "targets": self.batch.targets}
        return self.method.refine(model=self.model, unlabeled=unlabeled, **more)


def squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    """``mean_i |softmax(f_i) - z_i|^2``."""
    return (logits.softmax(1) - labels).square().sum(1).mean()
