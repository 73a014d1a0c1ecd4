"""Nets of other libraries, each with the mean and standard deviation that its weights expect."""

import difflib
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

from torch import Tensor, nn

from fastmeta.models.normalize import IMAGENET

Statistics = tuple[Sequence[float], Sequence[float]]


class LibraryNet(NamedTuple):
    """What a library gave."""

    net: nn.Module
    statistics: Statistics  # mean and standard deviation
    weights: dict[str, Tensor] | None  # the library's own, not loaded yet


class UnknownModel(ValueError):
    """No such net, or its package is missing; the text says what there is."""


def unknown(name: str, names: Sequence[str], prefix: str = "") -> UnknownModel:
    """The error for a name that is none of ``names``."""
    close = difflib.get_close_matches(name, names, n=4, cutoff=0.5)
    hint = f": did you mean {', '.join(prefix + match for match in close)}?" if close else ""
    return UnknownModel(f"model must name a net, got {prefix + name!r}, which is none{hint}")


def torchvision_net(name: str, num_classes: int, image_size: int, own_weights: bool) -> LibraryNet:
    """``torchvision:NAME``."""
    _package("torchvision", name)
    models = importlib.import_module("torchvision.models")
    names = models.list_models(module=models)
    if name not in names:
        raise unknown(name, names, "torchvision:")
    sized = {"image_size": image_size} if name.startswith("vit_") else {}
    net = models.get_model(name, weights=None, num_classes=num_classes, **sized)
    weights, statistics = None, IMAGENET
    if own_weights:
        source = models.get_model_weights(name).DEFAULT
        weights = source.get_state_dict(progress=False, check_hash=True)
        transforms = source.transforms()
        statistics = transforms.mean, transforms.std
    return LibraryNet(net, statistics, weights)


def timm_net(name: str, num_classes: int, image_size: int, own_weights: bool) -> LibraryNet:
    """``timm:NAME``."""
    timm = _package("timm", name)
    if not timm.is_model(name.split(".")[0]):
        raise unknown(name, timm.list_models(), "timm:")
    settings = timm.models.get_pretrained_cfg(name)
    fixed = settings is not None and settings.fixed_input_size
    sized = {"img_size": image_size} if fixed else {}
    net = timm.create_model(name, pretrained=own_weights, num_classes=num_classes, **sized)
    statistics = IMAGENET if settings is None else (settings.mean, settings.std)
    return LibraryNet(net, statistics, None)


class _LogitsOnly(nn.Module):
    """A net of transformers that gives its logits alone."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net(pixel_values=images).logits


def transformers_net(name: str, num_classes: int, image_size: int, own_weights: bool) -> LibraryNet:
    """``transformers:NAME_OR_FOLDER``: an image classifier, always with its weights; its size is what it is."""
    transformers = _package("transformers", name)
    try:
        net, report = transformers.AutoModelForImageClassification.from_pretrained(
            name, num_labels=num_classes, ignore_mismatched_sizes=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise UnknownModel(f"model transformers:{name} cannot be loaded: {first_line(error)}") from error
    layer = [module for module in net.modules() if isinstance(module, nn.Linear)][-1]
    head = {
        f"{prefix}.{part}" for prefix, module in net.named_modules() if module is layer for part in ("weight", "bias")
    }
    missing = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])} - head)
    if missing:
        shown = ", ".join(missing[:4]) + (f", {len(missing) - 4} more" if len(missing) > 4 else "")
        raise ValueError(f"model transformers:{name} has no weights that fit for {shown}")
    try:
        settings, _ = transformers.ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        settings = {}
    mean, std = settings.get("image_mean"), settings.get("image_std")
    return LibraryNet(_LogitsOnly(net), IMAGENET if mean is None or std is None else (mean, std), None)


LIBRARIES: dict[str, Callable[[str, int, int, bool], LibraryNet]] = {
    "torchvision": torchvision_net,
    "timm": timm_net,
    "transformers": transformers_net,
}
"""By the prefix of a name: of the rest of the name, classes, image size, and whether to fetch the library's weights."""


def first_line(error: Exception) -> str:
    """What an error of elsewhere says, for one line."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _package(package: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UnknownModel(f"model {package}:{name} needs the package {package}: pip install {package}") from error
