"""The evaluation protocol: which weights are evaluated, and which figure is a run's."""

import math
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.data import DataError, Images, Split, Views
from fastmeta.data.landmarks import errors_of
from fastmeta.data.reading import read_in_order
from fastmeta.training.config import EvaluationConfig, MachineConfig
from fastmeta.training.processes import Processes
from fastmeta.training.shards import is_sharded, whole_state

_PARTS = ("validation", "test")
_FROM_CLASSES = 20  # the second figure, of the five likeliest classes, says nothing where there are few
_LAST = 20


class Evaluator:
    """Errors on validation and test images, and the choice of what a run reports.

    ``best-validation``: the weights with the least validation error of the run (ties: the later ones, the average
    first); their test error rides along and is compared with nothing. ``last``: the last ones. ``mean-of-last-20`` and
    ``median-of-last-20``: of the test errors at the last 20 evaluations (of the validation errors where there are no
    test images, as papers have it on ImageNet); the weights are the last ones. Each process evaluates its part of the
    images.

    Args:
        config: the protocol; ``report`` None: best-validation where there are validation images, else last.
        images: all of them.
        split: which of them are for what.
        views: ``plain`` makes them the model's inputs.
        machine: device and workers.
        processes: those of the run.

    Raises:
        DataError: from a call: more than 1% of the validation or test images, and more than one, cannot be read.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        images: Images,
        split: Split,
        views: Views,
        *,
        machine: MachineConfig | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.config, self.images, self.split, self.views = config, images, split, views
        self.machine, self.processes = machine or MachineConfig(), processes or Processes()
        self.report = config.report or ("best-validation" if len(split.validation) else "last")
        if self.report == "best-validation" and not len(split.validation):
            raise ValueError(
                "evaluation.report must not be best-validation without validation images; got none of them"
            )
        if "last-20" in self.report and not len(split.test) + len(split.validation):
            raise ValueError(f"evaluation.report must be last without test or validation images, got {self.report!r}")
        self._figure = "test_error" if len(split.test) else "validation_error"
        self.unreadable: dict[str, str] = {}
        self.best: dict[str, Any] = {"validation_error": math.inf}
        self._history: list[float] = []  # of the reported kind of weights

    def __call__(self, step: int, student: nn.Module, average: nn.Module) -> dict[str, Any]:
        """A line of metrics.jsonl: the errors of the weights that the protocol names."""
        row: dict[str, Any] = {}
        kept = {"student": student, "average": average}
        if self.config.weights != "both":
            kept = {self.config.weights: kept[self.config.weights]}
        for name, model in kept.items():
            errors: dict[str, float] = {}
            for part in _PARTS:
                if len(getattr(self.split, part)):
                    errors.update(self._errors(model, part))
            row.update({f"{figure}_{name}": value for figure, value in errors.items()})
            if self.report == "best-validation":
                is_better = errors["validation_error"] <= self.best["validation_error"]
            else:
                is_better = name == list(kept)[-1]  # the average, if it is evaluated
            if is_better:
                figures = {"validation_error": None, "test_error": None, **errors, "step": step, "weights": name}
                self.best = {**figures, "model": whole_state(model)}
        if self.best[self._figure] is not None:
            self._history = [*self._history, self.best[self._figure]][-_LAST:]
        return row

    def reported(self) -> dict[str, Any]:
        """The run's figures; :attr:`best` has the weights."""
        figures = {name: value for name, value in self.best.items() if name != "model"}
        if "last-20" in self.report:
            middle = statistics.fmean if self.report.startswith("mean") else statistics.median
            figures[self._figure] = middle(self._history)
        return figures

    def predict(self, model: nn.Module, places: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Places that could be read and their logits, this process's part of ``places``, a batch at a time."""
        size = min(1000, max(16, 2**24 // math.prod(self.images.image_shape)))
        # A forward of sharded weights takes all processes, those that have no images left, too.
        missing = math.ceil(math.ceil(len(places) / self.processes.count) / size) if is_sharded(model) else 0
        places = places[self.processes.part(len(places))]
        model.eval()
        for read in read_in_order(self.images, places, batch_size=size, workers=self.machine.workers):
            self.unreadable.update(read.unreadable)
            if len(read.places):
                missing -= 1
                images = self.views.plain(read.images.to(self.machine.device, non_blocking=True))
                if self.machine.channels_last:
                    images = images.contiguous(memory_format=torch.channels_last)
                with torch.no_grad():
                    yield read.places, model(images)
        blank = torch.zeros(1, *self.images.image_shape, device=self.machine.device)
        for _ in range(missing):
            with torch.no_grad():
                model(self.views.plain(blank))

    def confusion(self, model: nn.Module, part: str) -> Tensor:
        """Counts ``[C, C]`` of the images of a part, by class (rows) and predicted class (columns)."""
        classes = len(self.images.classes)
        counts = torch.zeros(classes * classes, dtype=torch.int64, device=self.machine.device)
        for places, logits in self.predict(model, getattr(self.split, part)):
            targets = self.images.targets[places].to(logits.device)
            counts += torch.bincount(targets * classes + logits.argmax(dim=1), minlength=classes * classes)
        return self.processes.sum_(counts).view(classes, classes).cpu()

    def _errors(self, model: nn.Module, part: str) -> dict[str, float]:
        sums = torch.zeros(3, dtype=torch.float64, device=self.machine.device)  # images, wrong, not among five
        several = len(self.images.classes) >= _FROM_CLASSES
        for places, logits in self.predict(model, getattr(self.split, part)):
            targets = self.images.targets[places].to(logits.device)
            wrong = errors_of(self.images, logits, targets)
            sums[0] += len(wrong)
            sums[1] += wrong.sum()
            if several:
                five = logits.topk(5, dim=1).indices
                sums[2] += (five != targets.unsqueeze(1)).all(dim=1).sum()
        count, wrong_count, missing_count = self.processes.sum_(sums).tolist()
        self._check_read(part, int(count))
        errors = {f"{part}_error": wrong_count / count}
        if several:
            errors[f"{part}_top5_error"] = missing_count / count
        return errors

    def _check_read(self, part: str, count: int) -> None:
        """An error of a few of the images is no error of the part."""
        images = len(getattr(self.split, part))
        if count and images - count <= max(1, images // 100):
            return
        named = ", ".join(f"{name} ({cause})" for name, cause in list(self.unreadable.items())[:3])
        raise DataError(
            f"{images - count} of {images} {part} images cannot be read, expected 1% of them or one at most: {named}"
        )

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"best": self.best, "history": self._history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.best, self._history = state["best"], list(state["history"])
