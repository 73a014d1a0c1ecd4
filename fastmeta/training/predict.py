"""A finished run on other images or texts: classes, confidences and, of its unlabeled ones, what became of them."""

import csv
import functools
import io
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastmeta.data import Images, Plain, read_in_order
from fastmeta.data.augment.augmentation import PlainView
from fastmeta.data.text import AsTokens
from fastmeta.data.tokenizer import Tokenizer
from fastmeta.models import build_model
from fastmeta.models.bert import build_text_model
from fastmeta.training.files import write_text
from fastmeta.training.reports.run_folder import RunFolder
from fastmeta.training.reports.sections import FULL_CONFUSION
from fastmeta.training.whitening import read_whitening

_FEW = 1000  # images; with so few the start of worker processes takes longer than they save
_SHOWN = 3  # files or labels named in a line
_PAIRS = 10  # of classes, where there are too many for a matrix
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
        images: how many there are.
        unreadable: those without a prediction: path -> cause.
        known: how many were unlabeled images of the run.
        parts: errors where the images have labels.
        counts: ``[C, C]``, a row a true class, a column a predicted one; of all parts.
        foreign: labels that are no class of the run, and how many images have them.
    """

    images: int
    unreadable: dict[str, str]
    known: int
    parts: tuple[PartError, ...]
    counts: Tensor
    foreign: dict[str, int]


def predict(
    run: RunFolder,
    images: Images,
    out: Path,
    *,
    device: str = "cpu",
    workers: int | None = None,
    batch_size: int = 256,
    progress: bool = False,
) -> Predictions:
    """Predict the class of every image or text, and write a CSV with a line for each: path, label, confidence.

    Where some were unlabeled images of the run, each line also has the weight and how the label changed. A file that
    cannot be read has no label. The net sees the pixels that it saw in the evaluations of its training.

    Args:
        run: a finished run.
        images: what to predict.
        out: the CSV; it is whole or not there.
        device: where the net is.
        workers: processes that read and decode; None: one a core, and none for few images.
        batch_size: images at once.
        progress: show a bar.

    Raises:
        ValueError: the run is not finished, its net was trained on images of another shape, or there is no such device.
        OSError: the CSV cannot be written.
    """
    check_machine(device, batch_size, workers)
    model = load_model(run).to(device)
    if tuple(images.image_shape) != run.image_shape:
        raise ValueError(
            f"{images.name}: images have {_shape(tuple(images.image_shape))}, expected {_shape(run.image_shape)}, as "
            f"those of {run.folder}"
        )
    plain = _plain(run)
    labels = torch.full((len(images),), -1)
    confidences = torch.zeros(len(images))
    unreadable: dict[str, str] = {}
    if workers is None:
        workers = 0 if len(images) <= _FEW else os.cpu_count() or 1
    reading = read_in_order(images, torch.arange(len(images)), batch_size=batch_size, workers=workers)
    with torch.inference_mode(), tqdm(total=len(images), unit="images", disable=not progress, leave=False) as bar:
        for read in reading:
            unreadable.update(read.unreadable)
            if len(read.places):
                best = model(plain(read.images.to(device))).float().softmax(dim=1).max(dim=1)
                confidences[read.places], labels[read.places] = best.values.cpu(), best.indices.cpu()
            bar.update(len(read.places) + len(read.unreadable))
    known = _write(out, run, images, labels, confidences)
    parts, counts, foreign = _judged(run, images, labels)
    return Predictions(len(images), unreadable, known, parts, counts, foreign)


def check_machine(device: str, batch_size: int, workers: int | None = None) -> None:
    """Raise a ValueError unless there is such a device, an image in a batch, and no worker fewer than none."""
    if workers is not None and workers < 0:
        raise ValueError(f"workers must be at least 0, got {workers}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be cpu where torch sees no GPU, got 'cuda'")


def _plain(run: RunFolder) -> PlainView:
    """What the net saw in the evaluations of its training."""
    if run.task == "texts":
        return AsTokens()
    if run.config.get("augmentation", {}).get("whitening", "none") == "none":
        return Plain(run.config["image_size"])
    whitening = read_whitening(run.folder)
    if whitening is None:
        raise ValueError(f"{run.folder}: whitening.pt is not there, and the net knows whitened images alone")
    return whitening


def load_model(run: RunFolder) -> nn.Module:
    """The net of a finished run with the weights that it reports, in evaluation mode, on the CPU.

    Raises:
        ValueError: the run is not finished.
    """
    require_finished(run)
    if run.task == "texts":
        size = Tokenizer.read(str(run.folder)).size
        classes, length = len(run.classes), run.image_shape[0]
        return build_text_model(str(run.folder), classes, vocabulary=size, length=length).eval()
    return build_model(
        str(run.folder),
        num_classes=len(run.classes),
        channels=run.image_shape[0],
        image_size=run.config["image_size"],
    ).eval()


def require_finished(run: RunFolder) -> None:
    """Raise a ValueError that says how to go on, unless the run has left its weights."""
    if run.results is None or not (run.folder / "model.pt").exists():
        raise ValueError(
            f"{run.folder}: not finished (step {run.step} of {run.config.get('steps')}); the command that began it "
            f"continues it: {_command(run)}"
        )


def _command(run: RunFolder) -> str:
    words = ["fastmeta train"]
    for name in ("data", "labels_per_class", "base", "method"):
        value = run.config.get(name)
        if value is not None:
            words.append(f"--{name.replace('_', '-')} {value}")
    return " ".join([*words, f"--out {run.folder}", "..."])


def _shape(shape: tuple[int, ...]) -> str:
    if len(shape) == 1:
        return f"{shape[0]} tokens"
    channels, height, width = shape
    return f"{channels} {'channel' if channels == 1 else 'channels'} of {height} x {width} pixels"


def _write(out: Path, run: RunFolder, images: Images, labels: Tensor, confidences: Tensor) -> int:
    """Write the CSV; how many of the images were unlabeled ones of the run."""
    folder_of = functools.cache(os.path.realpath)

    def identity(path: str) -> str:
        """The same for two ways to write one file's path."""
        folder, name = os.path.split(path)
        return os.path.join(folder_of(folder), name)

    of_run = {identity(row["path"]): [sys.intern(row[name]) for name in _OF_UNLABELED] for row in run.unlabeled()}
    rows, known = [], 0
    for place, (label, confidence) in enumerate(zip(labels.tolist(), confidences.tolist(), strict=True)):
        path = images.describe(place)
        old = of_run.get(identity(path))
        known += old is not None
        predicted = ["", ""] if label < 0 else [run.classes[label], f"{confidence:.6f}"]
        rows.append([path, *predicted, *(old or [""] * len(_OF_UNLABELED))])
    header = ["path", "label", "confidence", *_OF_UNLABELED]
    if not known:
        header, rows = header[:3], [row[:3] for row in rows]
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_text(out, text.getvalue())
    return known


def _judged(run: RunFolder, images: Images, labels: Tensor) -> tuple[tuple[PartError, ...], Tensor, dict[str, int]]:
    """Predictions compared with the labels of the images, by the names of the classes."""
    number = {name: place for place, name in enumerate(run.classes)}
    mapped = torch.tensor([*(number.get(name, -1) for name in images.classes), -1])
    targets = mapped[images.targets]  # -1, no label, takes the last one
    counted = Counter(images.classes[target] for target in images.targets[(targets < 0) & (images.targets >= 0)])
    parts = []
    counts = torch.zeros(len(number) ** 2, dtype=torch.int64)
    for part, places in images.parts.items():
        judged = places[(targets[places] >= 0) & (labels[places] >= 0)]
        if len(judged):
            true, predicted = targets[judged], labels[judged]
            parts.append(PartError(part, len(judged), int((true != predicted).sum())))
            counts += torch.bincount(true * len(number) + predicted, minlength=len(counts))
    return tuple(parts), counts.view(len(number), len(number)), dict(counted)


def summary_of(predictions: Predictions, run: RunFolder) -> str:
    """What one wants to know at a prompt: how many, and how many are wrong where that is known."""
    kind = run.task
    lines = [f"{predictions.images:,} {kind}"]
    if predictions.known:
        lines[0] += f", {predictions.known:,} of them unlabeled {kind} of the run"
    for part in predictions.parts:
        share = 100 * part.errors / part.images
        lines.append(f"{part.part}: error {share:.2f}% ({part.errors:,} of {part.images:,} {kind} with a label)")
    if predictions.foreign:
        counted = ", ".join(f"{name} ({count:,})" for name, count in list(predictions.foreign.items())[:_SHOWN])
        lines.append(f"labels that are no class of the run: {counted}{_more(len(predictions.foreign))}")
    if predictions.parts:
        few = len(run.classes) <= FULL_CONFUSION
        lines += _matrix(predictions.counts, run.classes) if few else _pairs(predictions.counts, run.classes)
    return "\n".join(lines)


def unreadable_text(predictions: Predictions) -> str:
    """The files without a prediction, in a line."""
    unreadable = predictions.unreadable
    named = ", ".join(f"{path} ({cause})" for path, cause in list(unreadable.items())[:_SHOWN])
    return (
        f"{len(unreadable):,} of {predictions.images:,} images could not be read and have no label: "
        f"{named}{_more(len(unreadable))}"
    )


def _more(count: int) -> str:
    return f" and {count - _SHOWN:,} more" if count > _SHOWN else ""


def _matrix(counts: Tensor, classes: Sequence[str]) -> list[str]:
    width = max(4, *(len(str(count)) + 1 for count in counts.flatten().tolist()))
    longest = max(map(len, classes))
    numbers = "".join(f"{number:{width}}" for number in range(len(classes)))
    lines = ["confusion (all parts): a row is a label, a column what is predicted", " " * (longest + 4) + numbers]
    for number, (name, row) in enumerate(zip(classes, counts.tolist(), strict=True)):
        lines.append(f"{number:3} {name:{longest}}" + "".join(f"{count or '.':>{width}}" for count in row))
    return lines


def _pairs(counts: Tensor, classes: Sequence[str]) -> list[str]:
    """The classes that are most often taken for others."""
    wrong = counts - counts.diag().diag()
    most = wrong.flatten().sort(descending=True, stable=True)
    lines = ["most confused: label, predicted as, images"]
    for count, place in zip(most.values[:_PAIRS].tolist(), most.indices[:_PAIRS].tolist(), strict=True):
        if count:
            lines.append(f"  {classes[place // len(classes)]}, {classes[place % len(classes)]}, {count}")
    return lines if len(lines) > 1 else []
