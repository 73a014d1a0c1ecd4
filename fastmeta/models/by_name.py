"""A net by its name: ours, another library's, or one that a run left."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from fastmeta.capture import capture_features, last_linear
from fastmeta.models import libraries
from fastmeta.models.conv_large import ConvLarge
from fastmeta.models.conv_net import ConvNet
from fastmeta.models.libraries import Statistics, UnknownModel, first_line
from fastmeta.models.mlp import MLP
from fastmeta.models.mobilenet_v2 import MobileNetV2
from fastmeta.models.normalize import CIFAR, IMAGENET, SYMMETRIC, Normalized
from fastmeta.models.resnet import ResNet
from fastmeta.models.resnet26 import ResNet26
from fastmeta.models.tcdcn import TCDCN
from fastmeta.models.weights import load_weights, read_weights
from fastmeta.models.wide_resnet import WideResNet


class _Net(NamedTuple):
    """A net of ours."""

    build: Callable[[int, int, int], nn.Module]  # of classes, channels, image size
    statistics: Statistics | None = None  # of its input; None: as it is


NETS: dict[str, _Net] = {
    "linear": _Net(lambda c, channels, size: nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, c))),
    "conv-net": _Net(lambda c, channels, size: ConvNet(channels, c)),
    "mlp": _Net(lambda c, channels, size: MLP(channels * size * size, c, (128, 128, 128))),
    "conv-large": _Net(lambda c, channels, size: ConvLarge(c, channels=channels), SYMMETRIC),
    "conv-large-noise": _Net(
        lambda c, channels, size: ConvLarge(c, channels=channels, dropped="values", noise=0.15), CIFAR
    ),
    "conv-large-top-norm": _Net(lambda c, channels, size: ConvLarge(c, channels=channels, top_norm=True), SYMMETRIC),
    "wide-resnet-28-2": _Net(lambda c, channels, size: WideResNet(c, channels=channels), SYMMETRIC),
    "wide-resnet-28-8": _Net(lambda c, channels, size: WideResNet(c, width=8, channels=channels), SYMMETRIC),
    "wrn-28-2": _Net(
        lambda c, channels, size: WideResNet(c, channels=channels, momentum=0.001, eps=0.001, shared="first"), SYMMETRIC
    ),
    "wrn-28-2-l2i": _Net(
        lambda c, channels, size: WideResNet(
            c, channels=channels, bias=True, momentum=0.001, eps=0.001, shared="first"
        ),
        CIFAR,
    ),
    "resnet-18": _Net(lambda c, channels, size: ResNet(c, depth=18, channels=channels), IMAGENET),
    "resnet-26": _Net(lambda c, channels, size: ResNet26(c, channels=channels), IMAGENET),
    "resnet-34": _Net(lambda c, channels, size: ResNet(c, depth=34, channels=channels), IMAGENET),
    "resnet-50": _Net(lambda c, channels, size: ResNet(c, depth=50, channels=channels), IMAGENET),
    "resnet-101": _Net(lambda c, channels, size: ResNet(c, depth=101, channels=channels), IMAGENET),
    "mobilenet-v2": _Net(lambda c, channels, size: MobileNetV2(c, channels=channels), IMAGENET),
    "tcdcn": _Net(lambda c, channels, size: TCDCN(c, channels=channels, image_size=size), SYMMETRIC),
}
WITHOUT_LAST_LAYER = ("conv-large-top-norm",)
"""Nets of ours whose logits are not what their last linear layer gives."""
AUTOMATIC = ((16, "conv-net"), (48, "wide-resnet-28-2"), (96, "resnet-26"))  # up to this size; above: resnet-18


def automatic_model(image_size: int) -> str:
    """The net that ``"auto"`` stands for.

    >>> automatic_model(32), automatic_model(224)
    ('wide-resnet-28-2', 'resnet-18')
    """
    return next((name for largest, name in AUTOMATIC if image_size <= largest), "resnet-18")


def build_model(
    name: str, *, num_classes: int, channels: int, image_size: int, pretrained: str | None = None
) -> nn.Module:
    """A classifier of images ``[N, channels, image_size, image_size]`` in [0, 1], with logits ``[N, C]``.

    It normalizes its input itself, and its last ``nn.Linear`` gives the logits, so that
    :func:`fastmeta.capture_features` finds their features. Gray images are given to all three channels of a net that
    has three: those of other libraries, and ours where the weights are of three.

    Args:
        name: one of :data:`NETS`; "auto", by the images' size; ``torchvision:NAME`` or ``timm:NAME``, without weights;
            ``transformers:NAME_OR_FOLDER`` or the folder alone, with its weights; or the folder of a run, with what it
            left.
        num_classes: C; the last layer is new where the weights have another number.
        channels: 1 or 3.
        image_size: height and width in pixels.
        pretrained: a file of weights (``torch.save`` or safetensors) of this net, or "default": those that torchvision
            or timm download for it.

    Raises:
        UnknownModel: a ValueError: no such net (with the nearest names), or a package is missing (with its name).
        ValueError: the weights do not fit (with their names), or the net cannot take such images.

    >>> model = build_model("resnet-18", num_classes=10, channels=1, image_size=64)
    >>> model(torch.zeros(2, 1, 64, 64)).shape
    torch.Size([2, 10])
    """
    for argument, value in (("num_classes", num_classes), ("channels", channels), ("image_size", image_size)):
        if value < 1:
            raise ValueError(f"{argument} must be at least 1, got {value}")
    if name == "auto":
        name = automatic_model(image_size)
    if name in NETS:
        if pretrained == "default":
            raise ValueError(f"pretrained must be a file for our {name}, got 'default'; torchvision:, timm: have some")
        return _ours(name, num_classes, channels, image_size, pretrained)
    if Path(name).is_dir() and (Path(name) / "model.pt").is_file():
        return _of_run(Path(name), num_classes, channels, image_size, pretrained)
    if Path(name).is_dir():
        name = f"transformers:{name}"
    model = _of_library(name, num_classes, channels, image_size, pretrained)
    _check(model, name, num_classes, channels, image_size)
    return model


def _ours(name: str, num_classes: int, channels: int, image_size: int, pretrained: str | None) -> nn.Module:
    weights = None if pretrained is None else read_weights(pretrained)
    if weights is not None and channels == 1:
        first = next((value for value in weights.values() if value.dim() == 4), None)
        channels = 1 if first is None else first.shape[1]
    net = NETS[name].build(num_classes, channels, image_size)
    statistics = NETS[name].statistics
    model = net if statistics is None else Normalized(net, *(_of_channels(part, channels) for part in statistics))
    if weights is not None:
        load_weights(model, weights, f"pretrained {pretrained}")
    return model


def _of_channels(values: Sequence[float], channels: int) -> Sequence[float]:
    """One value a channel; of three, their mean where there are not three channels."""
    return values if len(values) in (1, channels) else (sum(values) / len(values),)


def _of_run(folder: Path, num_classes: int, channels: int, image_size: int, pretrained: str | None) -> nn.Module:
    try:
        name = json.loads((folder / "config.json").read_text())["model"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model {folder} must hold a run's config.json beside model.pt: {error}") from error
    pretrained = pretrained or str(folder / "model.pt")
    return build_model(name, num_classes=num_classes, channels=channels, image_size=image_size, pretrained=pretrained)


def _of_library(name: str, num_classes: int, channels: int, image_size: int, pretrained: str | None) -> nn.Module:
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3 for model {name}, got {channels}")
    library, _, inside = name.partition(":")
    if library not in libraries.LIBRARIES or not inside:
        if Path(name).is_file():
            raise UnknownModel(f"model must name a net, got a file; give --model NAME --pretrained {name}")
        raise libraries.unknown(name, ["auto", *NETS])
    own = pretrained == "default"
    try:
        made = libraries.LIBRARIES[library](inside, num_classes, image_size, own)
    except UnknownModel:
        raise
    except Exception as error:  # whatever they raise: a size that does not fit, a download that fails
        raise ValueError(f"model {name} cannot be made: {first_line(error)}") from error
    model = Normalized(made.net, *made.statistics)
    weights = made.weights if own or pretrained is None else read_weights(pretrained)
    if weights is not None:
        load_weights(model, weights, f"pretrained {pretrained}")
    return model


@torch.no_grad()
def _check(model: nn.Module, name: str, num_classes: int, channels: int, image_size: int) -> None:
    """Raise unless a net of elsewhere takes the images and its last linear layer gives its logits."""
    if getattr(model.net, "aux_logits", False):
        raise ValueError(f"model {name} gives auxiliary logits in training, and not one [N, C]")
    linear = f"model {name} must give logits [N, {num_classes}] by a last nn.Linear"
    try:
        last_linear(model)
    except ValueError as error:
        raise ValueError(f"{linear}: {first_line(error)}") from error
    trained = model.training
    model.eval()
    try:
        with capture_features(model) as tape:
            logits = model(torch.zeros(2, channels, image_size, image_size))
    except Exception as error:  # whatever a net of elsewhere raises
        raise ValueError(
            f"model {name} cannot take images of {image_size} x {image_size} pixels: {first_line(error)}"
        ) from error
    finally:
        model.train(trained)
    _, output = tape.calls[-1]
    if not isinstance(logits, torch.Tensor) or logits.shape != (2, num_classes) or not output.equal(logits):
        raise ValueError(linear)
