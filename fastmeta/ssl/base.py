"""What every base algorithm shares: the batch it is given, the loss it returns, and where a method comes in."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fastmeta import checks
from fastmeta.capture import FeatureTape, capture_features
from fastmeta.data.random_numbers import KeyedRandom
from fastmeta.methods import L2I, LabelGradientAlignment, Method
from fastmeta.ops.process_group import Group, sum_over, world_size
from fastmeta.ssl.labels import Finish, as_they_are


@dataclass(frozen=True)
class TrainingBatch:
    """One step's data.

    Args:
        labeled: weakly augmented labeled images ``[B_l, channels, height, width]``.
        targets: their classes ``[B_l]``, or the landmarks in these views ``[B_l, K]``.
        weak: weakly augmented unlabeled images ``[B_u, channels, height, width]``.
        second: another view of the same images, as :attr:`Algorithm.second_view` asks; ``[B_u, ...]`` or None.
        index: their places in the unlabeled set ``[B_u]``.
        holdout: images with labels for a method's outer objective only ``[B_h, ...]``; None: the labeled batch.
        holdout_targets: their classes ``[B_h]``.
        labeled_share: the factor of a mean over the labeled images, ``n W / B`` for n of the B images that W processes
            share: the mean of the processes' gradients is then that of one process, whoever has how many.
        unlabeled_share: that of a mean over the unlabeled images.
        labeled_keys: the labeled images' numbers in their stream ``[B_l]``, from which :meth:`random` draws; None where
            there is no stream.
        unlabeled_keys: those of the unlabeled images ``[B_u]``.
        seed: of the run.
        more: further views of the unlabeled images, as many as :attr:`Algorithm.more_views` says, each ``[B_u, ...]``.
        process_group: the processes that share the batch; None: this one alone.
        probe: labeled images as the augmentation's policy tries them ``[B_l, channels, height, width]``; None: it is
            not learned.
        moved: what the second view adds to the targets that the weak one has ``[B_u, K]``, of landmarks; None: classes,
            which a view leaves alone.
    """

    labeled: Tensor
    targets: Tensor
    weak: Tensor
    second: Tensor | None
    index: Tensor
    holdout: Tensor | None = None
    holdout_targets: Tensor | None = None
    labeled_share: float = 1.0
    unlabeled_share: float = 1.0
    labeled_keys: Tensor | None = None
    unlabeled_keys: Tensor | None = None
    seed: int = 0
    more: tuple[Tensor, ...] = ()
    process_group: Group = None
    probe: Tensor | None = None
    moved: Tensor | None = None

    @property
    def joined_share(self) -> float:
        """The factor of a mean over labeled and unlabeled images together."""
        labeled, unlabeled = len(self.labeled), len(self.weak)
        return (labeled + unlabeled) / (labeled / self.labeled_share + unlabeled / self.unlabeled_share)

    def random(self, purpose: str) -> tuple[KeyedRandom, KeyedRandom] | None:
        """Numbers for each labeled and unlabeled image, whichever process has it; None without keys."""
        if self.labeled_keys is None or self.unlabeled_keys is None:
            return None
        keys = {"labeled": self.labeled_keys, "unlabeled": self.unlabeled_keys}
        labeled, unlabeled = (KeyedRandom(self.seed, stream, purpose, numbers) for stream, numbers in keys.items())
        return labeled, unlabeled


@dataclass(frozen=True)
class Used:
    """Labels and weights of the unlabeled loss.

    Args:
        soft: labels before hardening ``[B_u, C]``, detached.
        labels: labels of the loss ``[B_u, C]``, detached; the same unless hardened.
        weights: mask times example weights ``[B_u]``.
        mask: ``[B_u]``.
        loss: to be added to the step's loss.
    """

    soft: Tensor
    labels: Tensor
    weights: Tensor
    mask: Tensor
    loss: Tensor


@dataclass(frozen=True)
class StepLoss:
    """What one step minimizes, and the labels behind it.

    Args:
        total: scalar on the graph; where several processes share the batch, the mean of theirs is that of all.
        labeled: the labeled part, scalar; likewise.
        unlabeled: the unlabeled part before its weight, scalar; likewise.
        imputed: probabilities that the base imputes ``[B_u, C]``, detached; None for a base that imputes none.
        used: what the unlabeled part was computed from.
    """

    total: Tensor
    labeled: Tensor
    unlabeled: Tensor
    imputed: Tensor | None = None
    used: Used | None = None


@dataclass(frozen=True)
class Refiner:
    """A method, and where it meets the loss of a base algorithm.

    Args:
        method: refines labels or weights.
        view: the unlabeled images whose predictions it differentiates: ``imputed``, those the labels come from, or
            ``learned``, those that learn from them (the inner loss as it is written).
        hard: it is given labels as the loss uses them (one-hot or sharp, with the mask) and not the probabilities
            behind them; one-hot labels have the derivative of these.
        passes: ``shared``: it works on the features of the base's own forward; ``own``: it is given the images and
            makes its own passes, as methods of the whole model do.
        own_update: its loss has an update of its own, after the base's and at the parameters that this left. That of a
            method that steps on labels (L2I V1) is the loss on them, :meth:`fastmeta.L2I.unlabeled_loss`.
        two_views: in that update the inner loss is taken on the images that the base's loss was trained on, and labels
            come from their other view, as in Learning to Impute (journal version, Algorithm 1, lines 7 and 8);
            otherwise both are one view.
        imputer: who imputes these labels: ``student`` (Algorithm 1 and the published code), or ``teacher``, whose
            labels have the student's derivative.
        moves_statistics: passes of that update that move BatchNorm's running statistics, too: ``none``, ``imputing``,
            ``inner`` (the published code) or ``both``.
        holdout: the examples of its outer loss: ``batch``, the base's labeled batch; ``labeled``, another batch of the
            labeled images, in a view of its own (Learning to Impute); ``part``, the hold-out part of the split, or
            ``drawn``, images drawn from it with replacement (the published code of Not All Unlabeled Data Are Equal).
        fresh: its table learns from batches of its own, after every ``method.interval`` updates of the base and at the
            parameters that these left; the base's loss only reads it (Not All Unlabeled Data Are Equal, Algorithm 1,
            lines 7 to 12).
        scheduled: an attribute of the method that follows the learning rate, as the published code of Meta-Gradient has
            it; None: none.
        scheduled_factor: times which that attribute is the learning rate of each step.

    Raises:
        ValueError: a choice is not one of those named, or the method is none that can meet the loss there.
    """

    method: Method
    view: Literal["imputed", "learned"] = "imputed"
    hard: bool = False
    passes: Literal["shared", "own"] = "shared"
    own_update: bool = False
    two_views: bool = False
    imputer: Literal["student", "teacher"] = "student"
    moves_statistics: Literal["none", "imputing", "inner", "both"] = "none"
    holdout: Literal["batch", "labeled", "part", "drawn"] = "batch"
    fresh: bool = False
    scheduled: str | None = None
    scheduled_factor: float = 1.0

    def __post_init__(self) -> None:
        checks.choice(self.view, "view", "imputed", "learned")
        checks.choice(self.passes, "passes", "shared", "own")
        checks.choice(self.imputer, "imputer", "student", "teacher")
        checks.choice(self.moves_statistics, "moves_statistics", "none", "imputing", "inner", "both")
        checks.choice(self.holdout, "holdout", "batch", "labeled", "part", "drawn")
        checks.number(self.scheduled_factor, "scheduled_factor", low=0.0)
        for switch in ("hard", "own_update", "two_views", "fresh"):
            if not isinstance(getattr(self, switch), bool):
                raise ValueError(f"{switch} must be True or False, got {getattr(self, switch)!r}")
        name = type(self.method).__name__
        if self.scheduled is not None and not isinstance(getattr(self.method, self.scheduled, None), int | float):
            raise ValueError(f"scheduled must be a number of {name} that may change, got {self.scheduled!r}")
        if self.fresh and (self.own_update or self.method.update.takes != "weights"):
            raise ValueError(f"fresh must be False for {name} with own_update={self.own_update}: it is for weights")
        if not self.own_update:
            if self.two_views or self.imputer != "student" or self.moves_statistics != "none":
                raise ValueError("two_views, imputer and moves_statistics must be left out without own_update")
        elif self.passes == "shared":
            raise ValueError("passes must be own with own_update, got 'shared'")
        elif self.hard and not self.two_views:
            raise ValueError("hard must be False for an own_update without two_views, got True")
        elif not self.method.update.needs_graph and not isinstance(self.method, L2I):
            raise ValueError(f"own_update must be False for {name}: it has no loss of its own")


class Algorithm(Protocol):
    """A base algorithm: a loss for one step, and what it remembers from step to step."""

    task: ClassVar[Literal["classification", "landmarks"]] = "classification"
    imputes: ClassVar[bool]
    second_view: ClassVar[Literal["weak", "strong"] | None]

    @property
    def more_views(self) -> int:
        """How many views of the unlabeled images it needs beside the weak one and the second, of the second's kind."""
        return 0

    def memory(self, num_unlabeled: int, num_classes: int, *, model: nn.Module, labels: Tensor) -> nn.Module | None:
        """What lives from step to step, for :meth:`loss`; None where nothing does.

        Buffers are equal on all processes after a step; parameters, if there are any, are trained as the model's are.

        Args:
            num_unlabeled: M, unlabeled images.
            num_classes: C.
            model: the student.
            labels: classes of the labeled images ``[L]``.
        """
        return None

    def finish(self, labels: Tensor, memory: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """What is learned of labels ``[N, C]``, and which of them ``[N]``: as they are, unless made hard or sharp."""
        return as_they_are(labels)

    def loss(
        self,
        model: nn.Module,
        batch: TrainingBatch,
        *,
        teacher: nn.Module,
        progress: float,
        refiner: Refiner | None = None,
        memory: nn.Module | None = None,
    ) -> StepLoss:
        """The loss of ``model`` on ``batch``.

        Args:
            model: the student, in training mode.
            batch: the step's data.
            teacher: the exponential moving average of the student's weights.
            progress: fraction of the training steps already taken, in [0, 1).
            refiner: refines the imputed labels; None for the base alone.
            memory: what :meth:`memory` gave; this step changes its buffers.

        Raises:
            ValueError: the algorithm has a memory, and this is not it.
        """
        ...


Memory = TypeVar("Memory", bound=nn.Module)


def remembered(memory: nn.Module | None, kind: type[Memory]) -> Memory:
    """The memory of a base that has one.

    Raises:
        ValueError: it is None or another's.
    """
    if not isinstance(memory, kind):
        raise ValueError(f"memory must be the {kind.__name__} that the base's memory(...) gave, got {memory!r}")
    return memory


def joined_mean(values: Tensor, share: float, group: Group) -> Tensor:
    """The mean over the rows of all processes, ``[...]`` float64 without a graph, equal on all of them.

    Args:
        values: this process's rows ``[n, ...]``.
        share: the factor of a mean over them, :attr:`TrainingBatch.unlabeled_share` or the like.
        group: the processes.
    """
    own = share * values.detach().double().mean(dim=0)
    return sum_over([own], group)[0] / world_size(group)


@contextlib.contextmanager
def features_for(refiner: Refiner | None, model: nn.Module) -> Iterator[FeatureTape | None]:
    """Capture the last layer's features if there is a method to use them."""
    if refiner is None or refiner.passes == "own":
        yield None
        return
    with capture_features(model) as tape:
        yield tape


@contextlib.contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Batch normalization uses the batch's statistics in the block and leaves its buffers alone."""
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    tracking = [layer.track_running_stats for layer in layers]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer, tracks in zip(layers, tracking, strict=True):
            layer.track_running_stats = tracks


def refine(
    refiner: Refiner | None,
    tape: FeatureTape | None,
    model: nn.Module,
    batch: TrainingBatch,
    *,
    imputed: Tensor,
    views: dict[str, Tensor],
    inputs: dict[str, Tensor],
    labeled_logits: Tensor,
    finish: Finish = as_they_are,
) -> Used:
    """The labels to learn from: ``imputed`` or what a method makes of them, then finished: made hard, sharpened.

    Args:
        refiner: None for the base alone.
        tape: the features of the forward pass that gave the logits.
        model: forwards the hold-out images, if the batch has any.
        batch: the step's data.
        imputed: probabilities ``[B_u, C]``; on the graph where a method may pull a gradient back through them.
        views: logits ``[B_u, C]`` of the unlabeled images that the labels come from (``imputed``) and of those that
            learn from them (``learned``).
        inputs: the images ``[B_u, ...]`` of both views.
        labeled_logits: ``[B_l, C]``; the hold-out examples if the batch has none of its own.
        finish: makes of them what is learned, and says which are: :func:`harden` or the like.
    """
    soft = imputed.detach()
    # Neither forward mode nor a second forward goes through DistributedDataParallel.
    model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    if refiner is None:
        labels, mask = finish(soft)
        return Used(soft, labels, mask, mask, soft.new_zeros(()))

    given: dict[str, Any] = {"index": batch.index, "labels": imputed, "mask": None}
    if refiner.hard:
        finished, confident = as_learned(finish, imputed)
        given |= {"labels": finished, "mask": confident}
    scheduled = isinstance(refiner.method, LabelGradientAlignment) and refiner.method.labeled_weight is not None
    if scheduled and tape is None:
        given["labeled_logits"] = labeled_logits
    if tape is None:
        with own_precision(refiner, imputed):
            refined = refiner.method.refine(
                model=model, unlabeled=inputs[refiner.view], **examples_of(batch, batch.labeled, batch.holdout), **given
            )
    else:
        labeled, holdout = tape.outputs(labeled_logits), None
        if batch.holdout is not None:
            with torch.no_grad(), frozen_statistics(model), capture_features(model) as holdout_tape:
                holdout_logits = model(batch.holdout)
            holdout = holdout_tape.outputs(holdout_logits)
        refined = refiner.method.refine(
            unlabeled=tape.outputs(views[refiner.view]), **examples_of(batch, labeled, holdout), **given
        )
    if scheduled:  # (T(i) - 1) times the mean over the labeled images that this process has
        refined = refined._replace(loss=batch.labeled_share * refined.loss)
    if refiner.hard:
        return Used(soft, refined.labels, confident * refined.weights, confident, refined.loss)
    labels, mask = finish(refined.labels)
    return Used(refined.labels, labels, mask * refined.weights, mask, refined.loss)


def as_learned(finish: Finish, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Labels ``[N, C]`` as the loss uses them, and the mask; hard ones have the derivative of those behind them."""
    finished, mask = finish(labels)
    if labels.requires_grad and not finished.requires_grad:
        finished = finished + (labels - labels.detach())
    return finished, mask


def own_precision(refiner: Refiner, logits: Tensor) -> contextlib.AbstractContextManager[Any]:
    """No autocast for a method that takes differences of passes of its own: bfloat16 cannot resolve them."""
    differences = refiner.method.derivative.how in ("finite_difference", "forward_difference")
    return torch.autocast(logits.device.type, enabled=False) if differences else contextlib.nullcontext()


def examples_of(batch: TrainingBatch, labeled: Any, holdout: Any) -> dict[str, Any]:
    """A method's examples with labels: the labeled batch is the hold-out batch where there is no other."""
    if holdout is None:
        return {"holdout": labeled, "targets": batch.targets, "labeled": None, "labeled_targets": None}
    return {
        "holdout": holdout,
        "targets": batch.holdout_targets,
        "labeled": labeled,
        "labeled_targets": batch.targets,
    }
