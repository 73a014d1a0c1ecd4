"""Files of weights, and weights put into a net."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fastmeta.capture import last_linear

_INSIDE = ("state_dict", "model_state_dict", "model", "net")  # where checkpoints of other trainers keep the weights
_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
_SHOWN = 4  # keys in an error


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file of torch (only tensors are loaded, no code is run) or of safetensors.

    Raises:
        ValueError: there is no such file, or no state dict in it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"pretrained must be a file of weights, got {path}: no such file")
    held = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    for name in _INSIDE:
        if isinstance(held, Mapping) and isinstance(held.get(name), Mapping):
            held = held[name]
    if not isinstance(held, Mapping) or not held or not all(isinstance(value, Tensor) for value in held.values()):
        raise ValueError(f"pretrained must be a state dict, names with tensors, got {path} with {_kind(held)}")
    weights = {str(key): value for key, value in held.items()}
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in weights):
            weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return weights


def _read_torch(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        cause = "it is no such file, or holds objects that are no tensors, which would run code"
        raise ValueError(f"pretrained must be tensors that torch.save wrote, got {path}: {cause}") from error
    except (zipfile.BadZipFile, RuntimeError, EOFError, ValueError, OSError) as error:
        raise ValueError(
            f"pretrained must be tensors that torch.save wrote, got {path}: it is damaged or cannot be read"
        ) from error


def _read_safetensors(path: Path) -> object:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ValueError(f"pretrained {path} needs the package safetensors: pip install safetensors") from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"pretrained must be a file of safetensors, got {path}: {error}") from error


def _kind(held: object) -> str:
    if not isinstance(held, Mapping):
        return type(held).__name__
    other = [f"{key}: {type(value).__name__}" for key, value in held.items() if not isinstance(value, Tensor)]
    return ", ".join(other[:_SHOWN]) or "nothing"


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Put ``weights`` into ``model``; a last layer of another number of classes is left as it is.

    Args:
        model: a net, or :class:`fastmeta.models.Normalized` around one.
        weights: by the names of the model's state dict, or of the net's.
        source: what errors call the weights.

    Raises:
        ValueError: other weights do not fit, are missing or left over; the text says which. Nothing is loaded then.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    >>> load_weights(model, nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 5)).state_dict(), "five classes")
    >>> load_weights(model, {"0.weight": torch.zeros(4, 2)}, "FILE")
    Traceback (most recent call last):
    ValueError: FILE does not fit the net: 0.weight is [4, 2] and not [2, 2]; without 0.bias, 1.bias, 1.weight
    """
    own = model.state_dict()
    if not any(key in own for key in weights):
        own_net = {f"net.{key}": value for key, value in weights.items()}
        weights = own_net if any(key in own for key in own_net) else weights
    layer, _ = last_linear(model)
    head = {
        key for name, module in model.named_modules() if module is layer for key in (f"{name}.weight", f"{name}.bias")
    }
    if any(key in weights and len(weights[key]) != len(own[key]) for key in head & own.keys()):
        weights = {key: own[key] if key in head and key in own else value for key, value in weights.items()}
    problems = [
        f"{key} is {list(weights[key].shape)} and not {list(own[key].shape)}"
        for key in sorted(weights.keys() & own.keys())
        if weights[key].shape != own[key].shape
    ]
    # Statistics of the input come with a whole model only; counts of batches are newer than some files.
    optional = {"mean", "std"} | {key for key in own if key.endswith("num_batches_tracked")}
    problems = _shortened(problems, ", ")
    problems += [f"without {text}" for text in _shortened(sorted(own.keys() - weights.keys() - optional), ", ")]
    problems += [f"left over are {text}" for text in _shortened(sorted(weights.keys() - own.keys()), ", ")]
    if problems:
        raise ValueError(f"{source} does not fit the net: {'; '.join(problems)}")
    model.load_state_dict({**own, **weights})


def _shortened(texts: list[str], separator: str) -> list[str]:
    """At most one text, of the first few."""
    rest = [f"{len(texts) - _SHOWN} more"] if len(texts) > _SHOWN else []
    return [separator.join([*texts[:_SHOWN], *rest])] if texts else []
