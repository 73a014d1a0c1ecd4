"""A method is a direction, a derivative and an update; this is what all of them share."""

from collections.abc import Hashable, Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from fastmeta import losses
from fastmeta.capture import Outputs
from fastmeta.derivatives import Derivative
from fastmeta.directions import DirectionRule
from fastmeta.evaluation import TRACELESS
from fastmeta.methods.arguments import (
    as_outputs,
    check_index,
    check_model_batch,
    check_on_graph,
    example_mask,
    holdout_targets,
    impute,
    rows,
)
from fastmeta.model_function import Inputs, ModelFunction, batch_size
from fastmeta.model_problem import AnyProblem, ModelProblem
from fastmeta.problem import Problem, Refined
from fastmeta.process_group import Group
from fastmeta.process_group import check as check_group
from fastmeta.updates import Update

Batch = dict[str, Any]  # the arguments of refine by name


class _Graphs(Protocol):
    def refine(self, method: "Method", batch: Batch) -> Refined:
        """One step, in place of :meth:`Method._refine`."""


class Method:
    """Any direction, derivative and update as one method, at the last layer or for the whole model.

    The published methods are subclasses that choose the three; every other choice works as well.

    Args:
        direction: a rule of :mod:`fastmeta.directions`.
        derivative: one of :mod:`fastmeta.derivatives`.
        update: one of :mod:`fastmeta.updates`; it must fit the derivative (labels or example weights).
        process_group: processes that the batch is spread over, whose gradients are summed; None: this one alone.

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
    # Arguments of refine that are examples.
    views: tuple[str, ...] = ("unlabeled", "holdout", "labeled")

    # Mode of the model in the method's own passes; None: as it stands.
    mode: Literal["train", "eval"] | None = None

    def __init__(
        self, direction: DirectionRule, derivative: Derivative, update: Update, *, process_group: Group = None
    ) -> None:
        check_group(process_group)
        self.direction = direction
        self.derivative = derivative
        self.update = update
        self.process_group = process_group
        self._graphs: _Graphs | None = None  # set by fastmeta.graph

    def refine(
        self,
        *,
        unlabeled: Outputs | Inputs,
        holdout: Outputs | Inputs | None = None,
        targets: Tensor | None = None,
        index: Tensor | None = None,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        labeled: Outputs | Inputs | None = None,
        labeled_targets: Tensor | None = None,
        model: nn.Module | None = None,
        holdout_gradient: Mapping[str, Tensor] | None = None,
    ) -> Refined:
        """Refine the labels or weights of one batch of unlabeled examples.

        At the last layer the examples are what the loop's own forward gave. With ``model`` they are its inputs (a
        tensor, a tuple of arguments or a dict of keyword arguments), and the method makes its own passes, which leave
        the model as it was; methods whose ``how`` is not ``last_layer`` need it.

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
            model: takes the examples as inputs.
            holdout_gradient: gradient of the mean hold-out loss by parameter name, where the loop has taken it already
                (``{name: p.grad ...}`` after the labeled backward pass) and the model did not move since; ``holdout``
                and ``targets`` may then be left out.

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
                "model": model,
                "holdout_gradient": holdout_gradient,
            }
        )

    def _refine(self, batch: Batch) -> Refined:
        if self._graphs is not None:
            return self._graphs.refine(self, batch)
        if batch["model"] is not None:
            return self._refine_model(batch)
        if batch["holdout_gradient"] is not None:
            raise ValueError("holdout_gradient must be None without model")
        if self.derivative.how != "last_layer":
            raise ValueError(
                f"model is needed by how={self.derivative.how!r}: refine(model=model, unlabeled=inputs, ...), got None"
            )
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
        return self._step(problem, index)

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

    @torch.compiler.disable(reason=TRACELESS)
    def _refine_model(self, batch: Batch) -> Refined:
        """One step with the model's inputs."""
        function = ModelFunction(batch["model"], mode=self.mode)
        on_graph = self.update.needs_graph and batch["labels"] is None
        if batch["holdout_gradient"] is not None:
            if self.derivative.how == "last_layer":
                raise ValueError("holdout_gradient must be None for how='last_layer', which takes it in closed form")
            batch = {**batch, "holdout_gradient": function.check(batch["holdout_gradient"], "holdout_gradient")}
        if self.update.needs_graph and not on_graph:
            check_on_graph(batch["labels"], "labels")
        if self.derivative.how == "last_layer":
            outputs = {
                name: function.outputs(batch[name], on_graph=on_graph and name == "unlabeled")
                for name in self.views
                if batch.get(name) is not None
            }
            return self._refine({**batch, **outputs, "model": None})
        with torch.no_grad():
            problem, index = self._model_problem(function, batch)
            computed = self._step(problem, index)
        if isinstance(computed, Refined):
            return self._finish(computed, computed.labels, batch)
        imputed = batch["labels"]
        if imputed is None:
            imputed = losses.prediction(problem.logits_on_graph, self.inner_loss)
        return self._finish(computed, imputed, batch)

    def _model_problem(self, function: ModelFunction, batch: Batch) -> tuple[ModelProblem, Tensor | None]:
        """The step's problem, and the checked index."""
        like = next(iter(function.parameters.values()))
        like = torch.empty(0, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32, device=like.device)
        index = check_model_batch(batch, like, self.update.needs_index, type(self).__name__)
        given = None if batch["labels"] is None else batch["labels"].detach().to(like)

        def impute(logits: Tensor) -> Tensor:
            return self.update.labels(losses.prediction(logits, self.inner_loss), index)

        return ModelProblem(
            function,
            unlabeled=batch["unlabeled"],
            impute=impute if given is None else self.update.labels(given, index),
            holdout=batch["holdout"],
            targets=batch["targets"],
            weights=self.update.weights(like.new_empty(batch_size(batch["unlabeled"]), 0), index),
            mask=None if batch["mask"] is None else batch["mask"].to(like),
            labeled=batch["labeled"],
            labeled_targets=batch["labeled_targets"],
            process_group=self.process_group,
            holdout_gradient=batch["holdout_gradient"],
            keep_graph=self.update.needs_graph and given is None,
        ), index

    def _step(self, problem: AnyProblem, index: Tensor | None) -> Refined | Tensor:
        gradient = self.derivative(problem, self.direction(problem))
        # Broadcasting would hide the mistake where N happens to be C.
        if gradient.dim() != (1 if self.update.takes == "weights" else 2):
            raise ValueError(
                f"{type(self.update).__name__} takes the gradient of {self.update.takes}, but "
                f"{type(self.derivative).__name__} gives {list(gradient.shape)}"
            )
        return gradient if self.update.needs_graph else self.update.apply(gradient, problem.labels, index)

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
            labeled_targets = holdout_targets(labeled_targets, rows_l, "labeled_targets")
        return Problem(
            unlabeled=rows_u,
            labels=labels,
            holdout=rows_h,
            targets=holdout_targets(targets, rows_h, "targets"),
            weights=self.update.weights(labels, index),
            mask=None if mask is None else example_mask(mask, labels),
            labeled=rows_l,
            labeled_targets=labeled_targets,
            has_bias=unlabeled.bias is not None,
            process_group=self.process_group,
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
