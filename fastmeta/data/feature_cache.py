"""The file of features: computed once, by one process, from where a killed one left off."""

import fcntl
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from fastmeta.capture import capture_features, last_linear
from fastmeta.data.augment import Views
from fastmeta.data.images import Images, fingerprint_of
from fastmeta.data.random_numbers import KeyedRandom
from fastmeta.data.reading import read_in_order

KINDS = ("weak", "strong")
_STORED = (torch.float32, torch.float16)
# Numbers of the images in a batch. On the CPU large activations are slow: their memory is fetched anew each time.
_VALUES = {"cpu": 2**21, "cuda": 2**25}
_SECONDS = 20.0  # at most this much work is lost with a killed process


@dataclass(frozen=True)
class FeatureCache:
    """Features on disk.

    Args:
        features: ``[M + 2 V A, D]``, a memory map: the plain view of every image, then V weak and V strong views of
            each of the A augmented ones.
        unreadable: places of the images that could not be read, and why; their features are 0.
        key: of everything that the features depend on.
    """

    features: Tensor
    unreadable: dict[int, str]
    key: str


def cache_features(
    model: nn.Module,
    images: Images,
    views: Views,
    *,
    folder: Path,
    augmented: Tensor,
    views_per_image: int,
    seed: int,
    batch_size: int | None,
    workers: int,
    device: torch.device,
    dtype: torch.dtype,
    on_progress: Callable[[int, int], None],
) -> FeatureCache:
    """The features, from the file or computed; the arguments are those of :func:`fastmeta.data.frozen_features`."""
    if batch_size is None:
        values = _VALUES["cuda" if device.type == "cuda" else "cpu"]
        batch_size = max(1, min(512, values // math.prod(images.image_shape)))
    for name, value in (("views_per_image", views_per_image), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if dtype not in _STORED:
        raise ValueError(f"dtype must be one of {', '.join(map(str, _STORED))}, got {dtype}")
    if len(augmented) and not 0 <= int(augmented.min()) <= int(augmented.max()) < len(images):
        raise ValueError(f"augmented must hold places in [0, {len(images)}), got up to {int(augmented.max())}")
    layer, _ = last_linear(model)
    kept = (views_per_image, seed, str(dtype))
    # Names, sizes and labels say nothing of pixels that were changed in place.
    pixels = (images.fingerprint, getattr(images, "stamp", ""), images.image_shape)
    key = fingerprint_of(*pixels, _weights(model, layer), _text(views), augmented, *kept)
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"features-{key}"
    finished, part, record = (stem.with_suffix(suffix) for suffix in (".bin", ".part", ".json"))
    rows, size = len(images) + len(KINDS) * views_per_image * len(augmented), layer.in_features
    with _alone(stem.with_suffix(".lock")):
        held = _read_record(record)
        whole = rows * size * dtype.itemsize
        if held["done"] != len(images) or not finished.is_file() or finished.stat().st_size != whole:
            writer = _Writer(model, views, augmented, views_per_image, seed, batch_size, device, dtype)
            _compute(writer, images, part, record, workers, on_progress)
            os.replace(part, finished)
            held = _read_record(record)
    features = torch.from_file(str(finished), shared=False, size=rows * size, dtype=dtype).view(rows, size)
    return FeatureCache(features, {int(place): cause for place, cause in held["unreadable"].items()}, key)


def _compute(
    writer: "_Writer",
    images: Images,
    part: Path,
    record: Path,
    workers: int,
    on_progress: Callable[[int, int], None],
) -> None:
    """Go on from what ``record`` says is in ``part``."""
    held: dict[str, Any] = _read_record(record) if part.is_file() else {"done": 0, "unreadable": {}}
    done, total = held["done"], len(images)
    if done == 0:
        part.unlink(missing_ok=True)
        record.unlink(missing_ok=True)
    saved = time.monotonic()
    trained = writer.model.training
    writer.model.to(writer.device).eval()
    try:
        with part.open("r+b" if done else "w+b") as file:
            file.truncate(writer.file_size(total))  # holes, which are zeros, where images cannot be read
            rest = torch.arange(done, total)
            for read in read_in_order(images, rest, batch_size=writer.images_at_once, workers=workers):
                expected = torch.arange(done, min(total, done + writer.images_at_once))
                for place in expected[~torch.isin(expected, read.places)].tolist():
                    held["unreadable"][str(place)] = read.unreadable[images.describe(place)]
                if len(read.places):
                    writer.write(file, read.places, read.images, total)
                done = held["done"] = done + len(expected)
                on_progress(done, total)
                if done == total or time.monotonic() - saved > _SECONDS:
                    file.flush()
                    os.fsync(file.fileno())
                    _write_record(record, held)
                    saved = time.monotonic()
    finally:
        writer.model.train(trained)


class _Writer:
    """Runs the views of some images through the model and writes their features where they belong."""

    def __init__(
        self,
        model: nn.Module,
        views: Views,
        augmented: Tensor,
        views_per_image: int,
        seed: int,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.model, self.views, self.augmented = model, views, augmented
        self.count, self.seed, self.device, self.dtype = views_per_image, seed, device, dtype
        self.images_at_once = batch_size
        self.row = last_linear(model)[0].in_features * dtype.itemsize

    def file_size(self, total: int) -> int:
        """Of the whole file."""
        return (total + len(KINDS) * self.count * len(self.augmented)) * self.row

    def write(self, file: IO[bytes], places: Tensor, images: Tensor, total: int) -> None:
        """Features of the images at ``places``, ascending: their plain views, and the others of augmented ones."""
        images = images.to(self.device)
        self._put(file, places, self._features(self.views.plain(images)))
        number = torch.searchsorted(self.augmented, places)
        inside = number < len(self.augmented)
        inside[inside.clone()] = self.augmented[number[inside]] == places[inside]
        if not inside.any():
            return
        images, keys = images[inside.to(self.device)], places[inside].to(self.device)
        made = []
        for kind in KINDS:
            for view in range(self.count):
                random = KeyedRandom(self.seed, "features", f"{kind} {view}", keys)
                made.append(self._features(getattr(self.views, kind)(images, random)))
        features = torch.stack(made, dim=1)  # [n, 2 V, D]
        first = total + len(KINDS) * self.count * number[inside]
        self._put(file, (first.unsqueeze(1) + torch.arange(features.shape[1])).flatten(), features.flatten(0, 1))

    @torch.no_grad()
    def _features(self, inputs: Tensor) -> Tensor:
        if inputs.dim() == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)  # the faster one for convolutions
        with capture_features(self.model) as tape:
            logits = self.model(inputs)
        features, output = tape.calls[-1]
        if features.dim() != 2 or not output.equal(logits):
            raise ValueError(
                "the model's logits [N, C] must be those of its last nn.Linear: its head alone cannot train"
            )
        stored = features.to("cpu", self.dtype)
        if not stored.isfinite().all():
            raise ValueError(f"features must be finite in {self.dtype}, got up to {float(features.abs().max()):.3g}")
        return stored

    def _put(self, file: IO[bytes], rows: Tensor, features: Tensor) -> None:
        """``features [n, D]`` at ``rows [n]``, ascending; neighbours are written at once."""
        for start, stop in _runs(rows):
            file.seek(int(rows[start]) * self.row)
            file.write(features[start:stop].contiguous().numpy().tobytes())


def _runs(rows: Tensor) -> Iterator[tuple[int, int]]:
    """Where consecutive numbers begin and end.

    >>> list(_runs(torch.tensor([3, 4, 5, 9, 11])))
    [(0, 3), (3, 4), (4, 5)]
    """
    breaks = (rows.diff() != 1).nonzero().flatten() + 1
    cuts = [0, *breaks.tolist(), len(rows)]
    return itertools.pairwise(cuts)


def _weights(model: nn.Module, layer: nn.Linear) -> str:
    """A digest of the net and its weights, without those of the last layer."""
    head = {
        f"{name}.{part}" for name, module in model.named_modules() if module is layer for part in ("weight", "bias")
    }
    state = {name: value for name, value in model.state_dict().items() if name not in head}
    parts = [part for name, value in state.items() for part in (name, value.cpu().reshape(-1).view(torch.uint8))]
    return fingerprint_of(repr(model), *parts)


def _text(views: Views) -> str:
    text = repr(views)
    if " at 0x" in text:
        raise ValueError(f"views must say what they do in their text, as dataclasses do, got {text}")
    return text


def _read_record(path: Path) -> dict[str, Any]:
    try:
        held = json.loads(path.read_text())
        return {"done": int(held["done"]), "unreadable": dict(held["unreadable"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {"done": 0, "unreadable": {}}


def _write_record(path: Path, held: dict[str, Any]) -> None:
    temporary = path.with_suffix(".json.new")
    temporary.write_text(json.dumps(held))
    os.replace(temporary, path)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time; the others wait."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
