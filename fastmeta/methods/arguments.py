"""Checks of what :meth:`fastmeta.Method.refine` is given."""

from typing import Any

import torch
from torch import Tensor

from fastmeta import checks, losses
from fastmeta.capture import Outputs
from fastmeta.model_function import batch_size
from fastmeta.problem import Rows


def impute(outputs: Outputs, labels: Tensor | None, needs_graph: bool, loss: str = "cross_entropy") -> Tensor:
    """Imputed labels ``[N, C]`` in float32 or float64: those given, or what the model predicts."""
    logits = as_outputs(outputs, "unlabeled").logits
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if labels is None:
        name, imputed = "unlabeled.logits", losses.prediction(logits.to(dtype), loss)
    else:
        name, imputed = "labels", checks.shaped(labels, "labels", "[N, C]", logits.shape).to(dtype)
    if not needs_graph:
        return imputed.detach()
    return check_on_graph(imputed, name)


def check_on_graph(imputed: Tensor, name: str) -> Tensor:
    """Raise unless the imputed labels are on the graph of autograd."""
    if not imputed.requires_grad:
        raise ValueError(f"{name} must be on the graph: this method pulls the gradient back through the imputer")
    return imputed


def rows(outputs: Outputs, name: str, dtype: torch.dtype, like: Rows | None = None) -> Rows:
    """Features and logits, detached, checked and in ``dtype``."""
    as_outputs(outputs, name)
    features = checks.matrix(outputs.features, f"{name}.features", "[N, D]")
    logits = checks.matrix(outputs.logits, f"{name}.logits", "[N, C]")
    if len(features) != len(logits):
        raise ValueError(
            f"{name}.features must be [N, D] with N = {len(logits)} like its logits, got {list(features.shape)}"
        )
    if like is not None:
        expected = like.features.shape[1], like.logits.shape[1]
        got = features.shape[1], logits.shape[1]
        if got != expected:
            raise ValueError(f"{name} must have D, C = {expected} like unlabeled, got {got}")
        if features.device != like.features.device:
            raise ValueError(f"{name} must be on {like.features.device} like unlabeled, got {features.device}")
    return Rows(features.detach().to(dtype), logits.detach().to(dtype))


def as_outputs(outputs: object, name: str) -> Outputs:
    """Raise unless it is :class:`fastmeta.Outputs`."""
    if not isinstance(outputs, Outputs):
        raise TypeError(f"{name} must be Outputs, from tape.outputs(logits), got {type(outputs).__name__}")
    return outputs


def holdout_targets(targets: Tensor, of: Rows, name: str) -> Tensor:
    """Targets of these rows, checked; probabilities in their dtype."""
    if isinstance(targets, Tensor) and targets.is_floating_point():
        targets = targets.detach().to(of.logits.dtype)
    try:
        return checks.targets(targets, of.features, of.logits.shape[1])
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("targets", name, 1)) from None


def example_mask(mask: Tensor, labels: Tensor) -> Tensor:
    """The mask ``[N]``, checked, in the dtype of the labels ``[N, C]``."""
    if not isinstance(mask, Tensor) or tuple(mask.shape) != (len(labels),):
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask must be [N] = [{len(labels)}], got {got}")
    return mask.detach().to(labels)


def check_index(index: Tensor | None, labels: Tensor, needed: bool, method: str) -> Tensor | None:
    """``index`` on the device of the labels ``[N, C]``; raises unless it is int64 ``[N]``, or None if not needed."""
    if index is None:
        if needed:
            raise ValueError(f"index is needed by {method}: the examples' places in the unlabeled set, int64 [N]")
        return None
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        got = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"index must be an int64 tensor, got {got}")
    if tuple(index.shape) != (len(labels),):
        raise ValueError(f"index must be [N] = [{len(labels)}] like unlabeled, got {list(index.shape)}")
    return index.to(labels.device, non_blocking=True)


def choice(value: object, name: str, *allowed: str) -> None:
    """Raise unless ``value`` is one of the names."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def check_model_batch(batch: dict[str, Any], like: Tensor, needs_index: bool, method: str) -> Tensor | None:
    """Check a batch of a model's inputs before the model runs; returns the index on the device of ``like``."""
    for name in ("unlabeled", "holdout", "labeled"):
        if isinstance(batch[name], Outputs):
            raise TypeError(f"{name} must be inputs of the model where model is given, got Outputs")
    if (batch["labeled"] is None) != (batch["labeled_targets"] is None):
        raise ValueError("labeled and labeled_targets must be given together")
    if (batch["holdout"] is None) != (batch["targets"] is None):
        raise ValueError("holdout and targets must be given together")
    if batch["holdout"] is None and batch["holdout_gradient"] is None:
        raise ValueError("holdout must be inputs of the model, or holdout_gradient given, got None")
    for name, inputs in (("targets", "holdout"), ("labeled_targets", "labeled")):
        if batch[name] is None:
            continue
        targets = batch[name]
        if not isinstance(targets, Tensor) or not (targets.is_floating_point() or targets.dtype == torch.int64):
            got = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
            raise TypeError(f"{name} must be int64 classes [N] or probabilities [N, C], got {got}")
        count = batch_size(batch[inputs], inputs)
        if len(targets) != count or targets.dim() != (2 if targets.is_floating_point() else 1):
            raise ValueError(f"{name} must have N = {count} like {inputs}, got {list(targets.shape)}")
    count = batch_size(batch["unlabeled"], "unlabeled")
    rows_like = like.new_empty(count, 1)
    if batch["mask"] is not None:
        example_mask(batch["mask"], rows_like)
    if batch["labels"] is not None and (batch["labels"].dim() != 2 or len(batch["labels"]) != count):
        raise ValueError(f"labels must be [N, C] with N = {count} like unlabeled, got {list(batch['labels'].shape)}")
    return check_index(batch["index"], rows_like, needs_index, method)
