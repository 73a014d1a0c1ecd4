"""What a finished run leaves: its figures, its weights, and what it found out about the unlabeled images."""

import csv
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmeta.data.landmarks import COORDINATES, Landmarks, landmark_table
from fastmeta.data.text import Texts
from fastmeta.data.tokenizer import FILE as TOKENIZER
from fastmeta.methods import ExampleWeights, ImputeAndWeight
from fastmeta.models.bert import write_encoder
from fastmeta.training.build import Built
from fastmeta.training.files import write_checkpoint, write_json, write_text
from fastmeta.training.processes import Processes
from fastmeta.training.shards import load_whole_state

_MOST_CLASSES = 100  # of a confusion matrix
_COLUMNS = ("path", "label", "confidence", "weight", "label_before", "label_after", "label_change", "truth")


def write_outcome(run: Built, folder: Path, processes: Processes) -> dict[str, Any]:
    """Write model.pt (the reported weights), details.json, unlabeled.csv and, last, results.json.

    All processes call it and predict a part of the images each; the first one writes. Of images with landmarks
    there is landmarks.csv in place of details.json and unlabeled.csv, which are about classes.

    Returns:
        What results.json holds.
    """
    config, evaluator, best, trainer = run.config, run.evaluator, run.evaluator.best, run.trainer
    found = confidence = label = None
    if isinstance(run.images, Landmarks):
        found = _find_all(run, run.images, processes)
    else:
        confidence, label = _impute_all(run, processes)
    model = trainer.model if best["weights"] == "student" else trainer.average.model
    load_whole_state(model, best["model"])
    part = next((name for name in ("test", "validation") if len(getattr(run.split, name))), None)
    confusion = None
    if part is not None and found is None and len(run.images.classes) <= _MOST_CLASSES:
        confusion = {"part": part, "counts": evaluator.confusion(model, part).tolist()}
    method = None if trainer.method is None else trainer.method.method
    weights = method.weights.tolist() if isinstance(method, (ExampleWeights, ImputeAndWeight)) else None
    results: dict[str, Any] = {
        "base": config.base,
        "method": config.method,
        "seed": config.seed,
        "labels": config.labels_per_class,
        **evaluator.reported(),
        "report": evaluator.report,
        "split": run.split.sizes(),
        "confusion": confusion,
        "skipped_steps": int(trainer.skipped[0]),
        "unreadable": dict(sorted(processes.joined({**trainer.batches.unreadable, **evaluator.unreadable}).items())),
    }
    if isinstance(run.images, Landmarks):
        results["standardized_by"] = [run.images.mean.tolist(), run.images.deviation.tolist()]
    if processes.is_first:
        if isinstance(run.images, Texts):
            run.images.tokenizer.write(folder / TOKENIZER)
            write_encoder(run.trainer.model, folder)
        write_checkpoint(folder / "model.pt", dict(run.weights_for_use(best["model"])), fsync=True)
        if found is not None:
            names = map(run.images.describe, run.split.unlabeled.tolist())
            write_text(folder / "landmarks.csv", landmark_table(names, found))
        elif label is not None and confidence is not None:
            write_json(folder / "details.json", _details(run, label, confidence, weights))
            write_text(folder / "unlabeled.csv", _unlabeled_table(run, label, confidence, weights))
        write_json(folder / "results.json", results, fsync=True)
    return results


def _impute_all(run: Built, processes: Processes) -> tuple[Tensor, Tensor]:
    """Confidence and class by the averaged weights of every unlabeled image as it is; 0 where it cannot be read."""
    places, images = run.split.unlabeled, run.images
    row_of = torch.zeros(len(images), dtype=torch.int64)
    row_of[places] = torch.arange(len(places))
    confidence = torch.zeros(len(places), device=run.trainer.device)
    label = torch.zeros(len(places), dtype=torch.int64, device=run.trainer.device)
    for read, logits in run.evaluator.predict(run.trainer.average.model, places):
        rows = row_of[read].to(logits.device)
        confidence[rows], label[rows] = logits.float().softmax(dim=1).max(dim=1)
    return processes.sum_(confidence).cpu(), processes.sum_(label).cpu()


def _find_all(run: Built, images: Landmarks, processes: Processes) -> Tensor:
    """Pixels ``[U, 10]`` of its picture where the averaged weights find the landmarks of every unlabeled image."""
    places = run.split.unlabeled
    row_of = torch.zeros(len(images), dtype=torch.int64)
    row_of[places] = torch.arange(len(places))
    found = torch.zeros(len(places), len(COORDINATES), dtype=torch.float64, device=run.trainer.device)
    for read, outputs in run.evaluator.predict(run.trainer.average.model, places):
        found[row_of[read].to(outputs.device)] = images.in_pictures(outputs, read)
    return processes.sum_(found).cpu()


def _details(run: Built, label: Tensor, confidence: Tensor, weights: list[float] | None) -> dict[str, Any]:
    """What plots of a comparison show, and CTAugment's rates; other lists follow the unlabeled part of the split."""
    places = run.split.unlabeled
    return {
        "unlabeled": places.tolist(),
        "target": run.images.targets[places].tolist(),
        "imputed": label.tolist(),
        "confidence": [round(value, 4) for value in confidence.tolist()],
        "weights": None if weights is None else [round(weight, 4) for weight in weights],
        "refinements": run.trainer.label_changes.largest(16),
        "rates": None if run.trainer.probes is None else run.trainer.probes.policy.rates_by_name(),
    }


def _unlabeled_table(run: Built, label: Tensor, confidence: Tensor, weights: list[float] | None) -> str:
    """A line for each unlabeled image: what it is taken for, its weight, and how the method changed its label."""
    images, changes = run.images, run.trainer.label_changes
    names = (*images.classes, "")  # -1 is no class
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(_COLUMNS)
    values, change = changes.values.cpu().tolist(), changes.change.cpu().tolist()
    truth = images.targets[run.split.unlabeled].tolist()
    for row, place in enumerate(run.split.unlabeled.tolist()):
        changed = ["", "", ""]
        if run.trainer.method is not None and change[row] > 0:
            _, before, _, after, _ = values[row]
            changed = [names[int(before)], names[int(after)], f"{change[row]:.4f}"]
        weight = "" if weights is None else f"{weights[row]:.4f}"
        readable = float(confidence[row]) > 0
        shown = [names[int(label[row])], f"{float(confidence[row]):.4f}"] if readable else ["", ""]
        table.writerow([images.describe(place), *shown, weight, *changed, names[truth[row]]])
    return text.getvalue()
