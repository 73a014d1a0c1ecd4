"""A method is a direction, a derivative and an update; this is what all of them share."""

from collections.abc import Hashable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from fastmeta import checks, losses
from fastmeta.capture import Outputs
from fastmeta.derivatives import Derivative
from fastmeta.directions import DirectionRule
from fastmeta.problem import Problem, Refined, Rows
from fastmeta.updates import Update

Batch = dict[str, Any]  # the arguments of refine by name


class _Graphs(Protocol):
    def refine(self, method: "Method", batch: Batch) -> Refined:
        """One step, in place of :meth:`Method._refine`."""


class Method:
    """Any direction, derivative and update as one method at the last layer.

    The published methods are subclasses that choose the three; every other choice works as well.

    Args:
        direction: a rule of :mod:`fastmeta.directions`.
        derivative: one of :mod:`fastmeta.derivatives`.
        update: one of :mod:`fastmeta.updates`; it must fit the derivative (labels or example weights).

    >>> import torch
    >>> from fastmeta import capture_features
    >>> from fastmeta.derivatives import LabelGradient
    >>> from fastmeta.directions import HoldoutGradient, UnitLength
    >>> from fastmeta.updates import LabelStep
    >>> method = Method(UnitLength(HoldoutGradient()), LabelGradient(reduction="sum"), LabelStep(step=0.1))
    >>> model = torch.nn.Linear(4, 2)
    >>> with capture_features(model) as tape:
    ...     logits_l, logits_u = model(torch.ones(5, 4)), model(torch.ones(6, 4))
    >>> targets = torch.zeros(5, dtype=torch.int64)
    >>> refined = method.refine(unlabeled=tape.outputs(logits_u), holdout=tape.outputs(logits_l), targets=targets)
    >>> refined.labels.shape, bool((refined.labels[:, 0] > logits_u.softmax(1)[:, 0]).all())
    (torch.Size([6, 2]), True)
    """

    # Labels are imputed as this loss's prediction: softmax(f), or f itself for regression.
    inner_loss = "cross_entropy"
    # Attributes that change with every step; a step's tensors depend on them through phase() alone.
    counters: tuple[str, ...] = ()

    def __init__(self, direction: DirectionRule, derivative: Derivative, update: Update) -> None:
        self.direction = direction
        self.derivative = derivative
        self.update = update
        self._graphs: _Graphs | None = None  # set by fastmeta.graph

    def refine(
        self,
        *,
        unlabeled: Outputs,
        holdout: Outputs,
        targets: Tensor,
        index: Tensor | None = None,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        labeled: Outputs | None = None,
        labeled_targets: Tensor | None = None,
    ) -> Refined:
        """Refine the labels or weights of one batch of unlabeled examples.

        Args:
            unlabeled: the unlabeled examples, ``tape.outputs(logits_u)``.
            holdout: the examples whose loss is to fall, ``tape.outputs(logits_l)``: labeled or validation examples.
            targets: their labels, int64 classes ``[Nh]`` or probabilities ``[Nh, C]``.
            index: places of the unlabeled examples in the unlabeled set ``[N]``, int64; methods with a table need it.
            labels: imputed labels ``[N, C]``; None: ``softmax`` of the unlabeled logits. A method that pulls the
                gradient back through the imputer needs them on the graph.
            mask: 0 for an unlabeled example that the training loss leaves out, else 1, ``[N]``.
            labeled: labeled examples of the training loss, where they are not the hold-out examples.
            labeled_targets: their labels.

        Returns:
            Labels ``[N, C]`` and weights ``[N]``, detached, and a loss to be added to the step's.

        Raises:
            ValueError: a shape does not fit, or something that the method needs is missing.
            TypeError: a dtype does not fit.
            IndexError: an index is outside the unlabeled set (checked on the CPU only).
        """
        return self._refine(
            {
                "unlabeled": unlabeled,
                "holdout": holdout,
                "targets": targets,
                "index": index,
                "labels": labels,
                "mask": mask,
                "labeled": labeled,
                "labeled_targets": labeled_targets,
            }
        )

    def _refine(self, batch: Batch) -> Refined:
        if self._graphs is not None:
            return self._graphs.refine(self, batch)
        # A GEMM of float32 must not become one of bfloat16 because the caller trains under autocast.
        with torch.autocast(as_outputs(batch["unlabeled"], "unlabeled").logits.device.type, enabled=False):
            imputed = self._impute(batch, self.update.needs_graph)
            return self._finish(self._compute(imputed.detach(), batch), imputed, batch)

    def _impute(self, batch: Batch, on_graph: bool) -> Tensor:
        return impute(batch["unlabeled"], batch["labels"], on_graph, self.inner_loss)

    @torch.no_grad()
    def _compute(self, imputed: Tensor, batch: Batch) -> Refined | Tensor:
        """The part of a step that works on tensors alone: what :func:`fastmeta.graph` captures.

        It counts nothing and needs no graph of autograd. An update that does gets the gradient in :meth:`_finish`.
        """
        index = check_index(batch["index"], imputed, self.update.needs_index, type(self).__name__)
        labels = self.update.labels(imputed, index)
        problem = self._problem(
            batch["unlabeled"],
            batch["holdout"],
            batch["targets"],
            labels,
            index,
            batch["mask"],
            batch["labeled"],
            batch["labeled_targets"],
        )
        return self._step(problem, labels, index)

    def _finish(self, computed: Refined | Tensor, imputed: Tensor, batch: Batch) -> Refined:
        """The rest of the step: counters, and what hangs on the caller's graph of autograd."""
        if isinstance(computed, Refined):
            return computed
        with torch.no_grad():
            index = check_index(batch["index"], imputed, self.update.needs_index, type(self).__name__)
            return self.update.apply(computed, self.update.labels(imputed, index), index)

    def phase(self) -> Hashable:
        """Whatever of its counters decides what the next step computes; steps of one phase share a CUDA graph."""
        return None

    def _step(self, problem: Problem, labels: Tensor, index: Tensor | None) -> Refined | Tensor:
        gradient = self.derivative(problem, self.direction(problem))
        # Broadcasting would hide the mistake where N happens to be C.
        if gradient.dim() != (2 if self.update.takes == "labels" else 1):
            raise ValueError(
                f"{type(self.update).__name__} takes the gradient of {self.update.takes}, but "
                f"{type(self.derivative).__name__} gives {list(gradient.shape)}"
            )
        return gradient if self.update.needs_graph else self.update.apply(gradient, labels, index)

    def _problem(
        self,
        unlabeled: Outputs,
        holdout: Outputs,
        targets: Tensor,
        labels: Tensor,
        index: Tensor | None,
        mask: Tensor | None,
        labeled: Outputs | None,
        labeled_targets: Tensor | None,
    ) -> Problem:
        """The step's problem, everything detached, checked and in one dtype."""
        dtype = labels.dtype
        rows_u = rows(unlabeled, "unlabeled", dtype)
        rows_h = rows(holdout, "holdout", dtype, like=rows_u)
        rows_l = None
        if labeled is None or labeled_targets is None:
            if labeled is not labeled_targets:
                raise ValueError("labeled and labeled_targets must be given together")
        else:
            rows_l = rows(labeled, "labeled", dtype, like=rows_u)
            labeled_targets = _targets(labeled_targets, rows_l, "labeled_targets")
        return Problem(
            unlabeled=rows_u,
            labels=labels,
            holdout=rows_h,
            targets=_targets(targets, rows_h, "targets"),
            weights=self.update.weights(labels, index),
            mask=None if mask is None else _mask(mask, labels),
            labeled=rows_l,
            labeled_targets=labeled_targets,
            has_bias=unlabeled.bias is not None,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that refining changes: tables, moments, averages, counters."""
        state: dict[str, Any] = {"update": self.update.state_dict()}
        rule = _stateful(self.direction)
        if rule is not None:
            state["direction"] = rule.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`state_dict`; refining then goes on bit for bit.

        Raises:
            ValueError: a tensor is missing or of another shape.
        """
        rule = _stateful(self.direction)
        for part in ("update",) if rule is None else ("update", "direction"):
            if part not in state:
                raise ValueError(f"state must have {part!r} for {type(self).__name__}, got {sorted(state)}")
        self.update.load_state_dict(state["update"])
        if rule is not None:
            rule.load_state_dict(state["direction"])


def _stateful(rule: Any) -> Any:
    """The rule with averages to save: this one, or the one that it refines; None if there is none."""
    while rule is not None and not hasattr(rule, "state_dict"):
        rule = getattr(rule, "of", None)
    return rule


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


def _targets(targets: Tensor, of: Rows, name: str) -> Tensor:
    if isinstance(targets, Tensor) and targets.is_floating_point():
        targets = targets.detach().to(of.logits.dtype)
    try:
        return checks.targets(targets, of.features, of.logits.shape[1])
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("targets", name, 1)) from None


def _mask(mask: Tensor, labels: Tensor) -> Tensor:
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
