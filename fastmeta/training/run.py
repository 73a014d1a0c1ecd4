"""One training run in memory: a step, an evaluation, and the state that continues it bit for bit."""

import copy
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.data import ImageDataset, StatelessSampler, StrongAugment, generator_for, make_split, weak_augment
from fastmeta.models import ConvNet
from fastmeta.ssl import Refiner, StepLoss, TrainingBatch
from fastmeta.training.config import RunConfig
from fastmeta.training.ema import ExponentialMovingAverage
from fastmeta.training.recipes import BASE_RECIPES, METHODS
from fastmeta.training.refinements import LargestRefinements

# Averaged over the steps between two evaluations. The two errors compare labels with the truth that training never
# reads: they are shown, nothing is chosen by them.
AVERAGES = ("loss", "loss_labeled", "loss_unlabeled", "confident", "imputed_error", "used_error")


class Run:
    """A base algorithm, a method and a seed on a dataset.

    Everything random is keyed by the seed and the step: runs that differ only in their base or method share split,
    initialization, data order and augmentation, and :meth:`state_dict` holds no iterator.

    Args:
        config: the settings.
        dataset: the images.
    """

    def __init__(self, config: RunConfig, dataset: ImageDataset) -> None:
        self.config = config
        self.split = make_split(dataset, config.labels, config.seed)
        self.dataset = dataset.to(config.device)
        torch.manual_seed(generator_for(config.seed, "initialization").initial_seed())
        self.model: nn.Module = ConvNet(dataset.image_shape[0], dataset.num_classes).to(config.device)
        self.ema = ExponentialMovingAverage(self.model, config.ema_decay)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=config.learning_rate,
            momentum=0.9,
            nesterov=True,
            weight_decay=config.weight_decay,
            foreach=True,
        )
        self.base = BASE_RECIPES[config.base]
        recipe = METHODS[config.method]
        self.uses_holdout = recipe.uses_holdout
        self.own_update = recipe.own_update
        self.refiner = recipe.build(len(self.split.unlabeled), dataset.num_classes)
        self._labeled = StatelessSampler(
            len(self.split.labeled), config.labeled_batch, seed=config.seed, stream="labeled"
        )
        self._unlabeled = StatelessSampler(
            len(self.split.unlabeled), config.unlabeled_batch, seed=config.seed, stream="unlabeled"
        )
        self._views: dict[str, Callable[[Tensor, torch.Generator], Tensor]]
        self._views = {"weak": weak_augment, "strong": StrongAugment()}

        self.step = 0
        self.seconds: list[float] = []
        self.best: dict[str, Any] = {"validation_error": math.inf}
        self.refinements = LargestRefinements()
        self._sums = torch.zeros(len(AVERAGES), device=config.device)
        self._summed = 0

    def batch(self, step: int) -> TrainingBatch:
        """The data of step ``step``, whatever happened before it."""
        device, dataset = self.config.device, self.dataset
        generator = generator_for(self.config.seed, "augment", step)
        labeled = self.split.labeled[self._labeled.batch(step)].to(device)
        index = self._unlabeled.batch(step)
        images = dataset.images[self.split.unlabeled[index].to(device)]
        labeled_images = self._views[self.config.labeled_view](dataset.images[labeled], generator)
        weak = weak_augment(images, generator)
        second = None if self.base.second_view is None else self._views[self.base.second_view](images, generator)
        batch = TrainingBatch(labeled_images, dataset.targets[labeled], weak, second, index.to(device))
        if not self.uses_holdout:
            return batch
        holdout = self.split.holdout.to(device)
        return dataclasses.replace(batch, holdout=dataset.images[holdout], holdout_targets=dataset.targets[holdout])

    def train_step(self) -> None:
        """One update of the weights, their average and the method. :attr:`seconds` gets its wall time."""
        begin = time.perf_counter()
        progress = self.step / self.config.steps
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * math.cos(7 / 16 * math.pi * progress)
        self.model.train()
        batch = self.batch(self.step)
        refiner = None if self.own_update else self.refiner
        loss = self.base.loss(self.model, batch, teacher=self.ema.model, progress=progress, refiner=refiner)
        self._update(loss.total)
        if self.own_update and self.refiner is not None:
            self._update(self._method_loss(self.refiner, batch))
        self.ema.update()
        if self.config.device == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - begin)
        self.step += 1
        self._watch(batch, loss)

    def _update(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def _method_loss(self, refiner: Refiner, batch: TrainingBatch) -> Tensor:
        """The method's loss at the parameters that the base's update left, from passes of its own."""
        unlabeled = batch.weak if refiner.view == "imputed" or batch.second is None else batch.second
        refined = refiner.method.refine(
            model=self.model, unlabeled=unlabeled, holdout=batch.labeled, targets=batch.targets, index=batch.index
        )
        return refined.loss

    @torch.no_grad()
    def _watch(self, batch: TrainingBatch, loss: StepLoss) -> None:
        zero = loss.total.new_zeros(())
        values = [loss.total.detach(), loss.labeled, loss.unlabeled, zero, zero, zero]
        if loss.imputed is not None and loss.used is not None:
            truth = self.dataset.targets[self.split.unlabeled.to(batch.index.device)[batch.index]]
            values[3] = loss.used.mask.mean()
            values[4] = (loss.imputed.argmax(dim=1) != truth).float().mean()
            values[5] = (loss.used.soft.argmax(dim=1) != truth).float().mean()
            if self.refiner is not None:
                self.refinements.add(self.step, batch.index, loss.imputed, loss.used.soft)
        self._sums += torch.stack(values)
        self._summed += 1

    def evaluate(self) -> dict[str, Any]:
        """Errors of the weights and of their average on validation and test images, and the averages since last time.

        The lower validation error of the run so far decides which weights are reported (ties: the later ones, the
        average first): their test error rides along in :attr:`best` and is compared with nothing.
        """
        row: dict[str, Any] = {"step": self.step}
        averages = (self._sums / max(1, self._summed)).tolist()
        row.update(zip(AVERAGES, averages, strict=True))
        self._sums.zero_()
        recent = self.seconds[len(self.seconds) - self._summed :]
        row["seconds_per_step"] = sum(recent) / max(1, len(recent))
        self._summed = 0
        for name, model in (("student", self.model), ("average", self.ema.model)):
            errors = {part: self._error(model, getattr(self.split, part)) for part in ("validation", "test")}
            row[f"validation_error_{name}"], row[f"test_error_{name}"] = errors["validation"], errors["test"]
            if errors["validation"] <= self.best["validation_error"]:
                self.best = {
                    "validation_error": errors["validation"],
                    "test_error": errors["test"],
                    "step": self.step,
                    "weights": name,
                    "model": copy.deepcopy(model.state_dict()),
                }
        return row

    @torch.no_grad()
    def _error(self, model: nn.Module, indices: Tensor) -> float:
        model.eval()
        indices = indices.to(self.config.device)
        wrong = model(self.dataset.images[indices]).argmax(dim=1) != self.dataset.targets[indices]
        return wrong.float().mean().item()

    @torch.no_grad()
    def impute_all(self) -> Tensor:
        """Probabilities of the averaged weights for every unlabeled image as it is. ``[M, C]``."""
        self.ema.model.eval()
        return self.ema.model(self.dataset.images[self.split.unlabeled.to(self.config.device)]).softmax(dim=1)

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on; tensors and plain values only."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "method": None if self.refiner is None else self.refiner.method.state_dict(),
            "random": torch.get_rng_state(),
            "best": self.best,
            "refinements": self.refinements.state_dict(),
            "seconds": self.seconds,
            "sums": self._sums,
            "summed": self._summed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict` of a run with the same settings."""
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.refiner is not None:
            self.refiner.method.load_state_dict(state["method"])
        torch.set_rng_state(state["random"])
        self.best = state["best"]
        self.refinements.load_state_dict(state["refinements"])
        self.seconds = list(state["seconds"])
        self._sums = state["sums"].to(self.config.device)
        self._summed = state["summed"]
