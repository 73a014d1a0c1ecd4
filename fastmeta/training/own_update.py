"""The loss of a method's own update, after the base's: Learning to Impute, Algorithm 1, lines 7 to 11."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta import losses
from fastmeta.methods import L2I
from fastmeta.ssl import Algorithm, MixMatch, Refiner, TrainingBatch
from fastmeta.ssl.base import examples_of, frozen_statistics, own_precision
from fastmeta.updates import LabelLogitStep


def own_loss(
    refiner: Refiner,
    batch: TrainingBatch,
    *,
    model: nn.Module,
    teacher: nn.Module,
    base: Algorithm,
    memory: nn.Module | None,
    processes: int,
) -> Tensor:
    """Its gradient is the method's update of the model, at the parameters that the base's update left.

    With two views the inner loss is taken on the images that the base trains on, and labels come from the view that
    the base's labels come from (without its distribution alignment): MixMatch's from the mean over all its views. A
    step on the logits of labels (V1 of the code) starts from the predictions behind hard ones.

    Args:
        refiner: the method, and how it does that.
        batch: the data of the base's update.
        model: the student, in training mode.
        teacher: the average of its weights.
        base: the base algorithm.
        memory: the base's.
        processes: how many share the batch; the mean of their losses' gradients is that of one process.
    """
    method, moves = refiner.method, refiner.moves_statistics
    trained, other = batch.weak, batch.second
    if base.second_view is not None and (refiner.two_views or refiner.view == "learned"):
        assert batch.second is not None, "the base's second view"
        trained, other = batch.second, batch.weak
    labels, mask = None, None
    if refiner.two_views:
        views = [batch.weak, batch.second, *batch.more] if isinstance(base, MixMatch) else [other]
        with _statistics(model, moves in ("imputing", "both")):
            labels = _said(model, views, method.inner_loss)
        if refiner.imputer == "teacher":
            teacher.train()  # batch statistics for teacher and student alike
            with torch.no_grad(), frozen_statistics(teacher):
                said = _said(teacher, views, method.inner_loss)
            labels = said + (labels - labels.detach())
        if batch.moved is not None:
            labels = labels + batch.moved
        if refiner.hard:
            finished, mask = base.finish(labels, memory)
            if finished.requires_grad:  # sharp, or as they were
                labels = finished
            elif not isinstance(method.update, LabelLogitStep):  # hard ones have no finite logits to step on
                labels = finished + (labels - labels.detach())
    with own_precision(refiner, trained):
        refined = method.refine(
            model=model,
            unlabeled=trained,
            labels=labels,
            mask=mask,
            index=batch.index,
            **examples_of(batch, batch.labeled, batch.holdout),
        )
    if method.update.needs_graph:
        if moves in ("inner", "both"):  # by the inner loss's pass, which the method makes without
            with torch.no_grad():
                model(trained)
        return refined.loss
    assert isinstance(method, L2I), "checked by Refiner"
    with _statistics(model, moves in ("inner", "both")):
        logits = model(trained)
    share = processes if method.second_reduction == "sum" else batch.unlabeled_share
    return share * method.unlabeled_loss(logits, refined.labels, mask)


def _said(model: nn.Module, views: Sequence[Tensor | None], loss: str) -> Tensor:
    """The mean of the model's predictions on the views ``[B_u, C]``."""
    return torch.stack([losses.prediction(model(view), loss) for view in views]).mean(dim=0)


def _statistics(model: nn.Module, move: bool) -> contextlib.AbstractContextManager[Any]:
    """Whether passes in the block move BatchNorm's running statistics."""
    return contextlib.nullcontext() if move else frozen_statistics(model)
