"""A finished run on other images: classes, confidences and, for the run's unlabeled images, what became of them."""

import csv
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.utils.data
from torch import Tensor, nn
from tqdm import tqdm

from fastmeta.data.augment import views_for
from fastmeta.data.images import Images, UnreadableImage
from fastmeta.models.by_name import build_model
from fastmeta.training.files import write_text
from fastmeta.training.run_folder import RunFolder, read_run

_FEW = 1000  # images; with so few the start of worker processes takes longer than they save
_OF_UNLABELED = ("weight", "label_before", "label_after", "label_change")


@dataclass(frozen=True)
class PartError:
    """Errors on the images of one part that have a label.

    Args:
        part: its name.
        images: how many of them.
        errors: how many are predicted as another class.
    """

    part: str
    images: int
    errors: int


@dataclass(frozen=True)
class Predictions:
    """What was predicted.

    Args:
        classes: of the run.
        images: how many there are.
        unreadable: those without a prediction: path -> cause.
        parts: errors where the images have labels.
        counts: ``[C, C]``, a row a true class, a column a predicted one; over all parts.
        foreign: labels that are no class of the run -> how many images have them.
        own: the run was made with these images.
    """

    classes: tuple[str, ...]
    images: int
    unreadable: dict[str, str]
    parts: tuple[PartError, ...]
    counts: Tensor
    foreign: dict[str, int] = field(default_factory=dict)
    own: bool = False


def predict(
    run: Path,
    images: Images,
    out: Path,
    *,
    device: str = "cpu",
    workers: int | None = None,
    batch_size: int = 256,
    progress: bool = False,
) -> Predictions:
    """Predict the class of every image, and write a CSV with a line for each: path, label, confidence.

    For images that were unlabeled ones of the run, the line also has their weight and how their label changed. The
    label of a file that cannot be read is empty. The net sees what it saw in the evaluations of its training.

    Args:
        run: the folder of a finished run.
        images: what to predict.
        out: the CSV; it is whole or not there.
        device: where the net is.
        workers: processes that read and decode; None: one a core, and none for few images.
        batch_size: images at once.
        progress: show a bar.

    Raises:
        ValueError: ``run`` is no run or not finished, or the images have another number of channels than its net.
        OSError: the CSV cannot be written.
    """
    folder = read_run(run)
    model = load_model(folder).to(device)
    expected, got = folder.record["image_shape"][0], images.image_shape[0]
    if got != expected:
        raise ValueError(f"data must have {_channels(expected)}, as the run's images have, got {_channels(got)}")
    plain = views_for(folder.config["views"], images.image_shape, folder.config["image_size"]).plain
    labels = torch.full((len(images),), -1)
    confidences = torch.zeros(len(images))
    unreadable: dict[str, str] = {}
    with torch.inference_mode(), tqdm(total=len(images), unit="images", disable=not progress, leave=False) as bar:
        for places, pixels, failed in _batches(images, batch_size, _processes(workers, len(images)), device):
            unreadable |= failed
            if len(places):
                best = model(plain(pixels.to(device))).float().softmax(1).max(dim=1)
                confidences[places], labels[places] = best.values.cpu(), best.indices.cpu()
            bar.update(len(places) + len(failed))
    _write(out, folder, images, labels, confidences)
    return _judged(folder, images, labels, unreadable)


def load_model(run: RunFolder) -> nn.Module:
    """The net of a finished run with the weights that it reports, in evaluation mode, on the CPU.

    Raises:
        ValueError: the run is not finished.
    """
    path = run.folder / "model.pt"
    if run.results is None or not path.exists():
        steps = run.config.get("steps")
        raise ValueError(
            f"run must be finished, got {str(run.folder)!r} at step {run.step} of {steps}; the command that it was "
            f"started with continues it: {_command(run)}"
        )
    model = build_model(
        str(run.folder),
        num_classes=len(run.classes),
        channels=run.record["image_shape"][0],
        image_size=run.config["image_size"],
    )
    return model.eval()


def _command(run: RunFolder) -> str:
    words = ["fastmeta train"]
    for name in ("data", "labels_per_class", "base", "method", "seed"):
        value = run.config.get(name)
        if value is not None:
            words.append(f"--{name.replace('_', '-')} {value}")
    return " ".join([*words, f"--out {run.folder}", "..."])


def _channels(count: int) -> str:
    return {1: "1 channel (gray)", 3: "3 channels (RGB)"}.get(count, f"{count} channels")


def _processes(workers: int | None, images: int) -> int:
    if workers is not None:
        return workers
    return 0 if images <= _FEW else os.cpu_count() or 1


class _Reader(torch.utils.data.Dataset):
    """A list of places to the images there; those that cannot be read are named instead."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __getitem__(self, places: list[int]) -> tuple[list[int], Tensor, dict[str, str]]:
        try:
            return places, self.images.get(torch.tensor(places)), {}
        except UnreadableImage:
            pass  # find out which, one at a time
        readable, pixels, failed = [], [], {}
        for place in places:
            try:
                pixels.append(self.images.get(torch.tensor([place])))
                readable.append(place)
            except UnreadableImage as error:
                failed[error.description] = error.cause
        return readable, torch.cat(pixels) if pixels else torch.empty(0), failed


def _batches(
    images: Images, batch_size: int, workers: int, device: str
) -> Iterator[tuple[list[int], Tensor, dict[str, str]]]:
    batches = [list(range(start, min(start + batch_size, len(images)))) for start in range(0, len(images), batch_size)]
    yield from torch.utils.data.DataLoader(
        _Reader(images),
        sampler=batches,
        batch_size=None,  # the sampler's elements are batches
        collate_fn=_unchanged,
        num_workers=workers,
        pin_memory=device != "cpu",
    )


def _unchanged(batch: Any) -> Any:
    return batch


def _write(out: Path, run: RunFolder, images: Images, labels: Tensor, confidences: Tensor) -> None:
    known = {_identity(row["path"]): row for row in run.unlabeled()}
    rows: list[list[str]] = []
    some_known = False
    for place, (label, confidence) in enumerate(zip(labels.tolist(), confidences.tolist(), strict=True)):
        path = images.describe(place)
        row = known.get(_identity(path))
        some_known |= row is not None
        more = [row[name] for name in _OF_UNLABELED] if row is not None else [""] * len(_OF_UNLABELED)
        rows.append([path, *(["", ""] if label < 0 else [run.classes[label], f"{confidence:.6f}"]), *more])
    header = ["path", "label", "confidence", *_OF_UNLABELED]
    if not some_known:
        header, rows = header[:3], [row[:3] for row in rows]
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_text(out, text.getvalue())


def _identity(path: str) -> str:
    """The same for two ways to write one file's path; what is no file stays as it is."""
    return os.path.realpath(path) if os.path.exists(path) else path


def _judged(run: RunFolder, images: Images, labels: Tensor, unreadable: dict[str, str]) -> Predictions:
    """Compared with the labels of the images, by the names of the classes."""
    number = {name: place for place, name in enumerate(run.classes)}
    mapped = torch.tensor([number.get(name, -1) for name in images.classes] + [-1])
    targets = mapped[images.targets]  # -1, no label, takes the last one
    foreign = {
        name: int((images.targets == place).sum()) for place, name in enumerate(images.classes) if name not in number
    }
    parts = []
    counts = torch.zeros(len(number), len(number), dtype=torch.int64)
    for part, places in images.parts.items():
        judged = places[(targets[places] >= 0) & (labels[places] >= 0)]
        if len(judged):
            true, predicted = targets[judged], labels[judged]
            parts.append(PartError(part, len(judged), int((true != predicted).sum())))
            counts.view(-1).index_add_(0, true * len(number) + predicted, torch.ones_like(true))
    own = images.fingerprint == run.record.get("fingerprint")
    return Predictions(run.classes, len(images), unreadable, tuple(parts), counts, foreign, own)
