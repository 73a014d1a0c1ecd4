"""A method is a direction, a derivative and an update; this is what all of them share."""

import contextlib
import warnings
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from fastmeta import losses
from fastmeta.capture import Outputs
from fastmeta.derivatives import Derivative
from fastmeta.directions import DirectionRule
from fastmeta.methods.batch import Batch, as_outputs, check_on_graph, like_parameters
from fastmeta.ops.process_group import Group, running_processes
from fastmeta.ops.process_group import check as check_group
from fastmeta.problem import LastLayerProblem, Problem, WholeModelProblem, full_precision
from fastmeta.problem.evaluation import WHY_NOT_TRACED
from fastmeta.problem.model_function import Inputs, ModelFunction
from fastmeta.problem.sharded_function import function_of
from fastmeta.problem.targets import Given
from fastmeta.state import Stateful, entry
from fastmeta.updates import Refined, Update


class _Graphs(Protocol):
    def refine(self, method: "Method", batch: Batch) -> Refined:
        """One step, in place of :meth:`Method._refine`."""


class _Calls:
    """What changes with the calls. torch.compile takes a module's numbers for constants and would compile each step."""

    __slots__ = ("learns", "number", "processes_checked")

    def __init__(self) -> None:
        self.number = 0
        self.learns: bool | None = None
        """what :meth:`Method.learning` says about the calls within it"""
        self.processes_checked = False
        """whether :meth:`Method._warn_of_other_processes` has run, or need not"""

    @torch.compiler.disable(reason="compiled code would take the number for a constant")
    def read(self) -> int:
        return self.number

    @torch.compiler.disable(reason="compiled code would take the number for a constant")
    def add(self) -> None:
        self.number += 1


class Method(Stateful):
    """Any direction, derivative and update as one method, at the last layer or for the whole model.

    The published methods are subclasses that choose the three; every other choice works as well. A method is a module
    whose buffers are its tables, moments and averages: ``to(device)`` moves them, and where the method is an attribute
    of a module they are part of its ``state_dict``. It has no parameters. Numbers that a schedule moves (``rate``,
    ``weight``, ``lr``, ``damping``, ``step``, ``label_step``) are attributes of the methods that have them, to be set
    between calls.

    A step that is not finite, of which a loss scaler skips the backward pass, leaves tables, moments and averages as
    they were, whichever example is at fault and whether or not ``mask`` leaves it out. Weights and labels of tables
    come back as they were before it; ``calls`` counts it.

    Args:
        direction: a rule of :mod:`fastmeta.directions`.
        derivative: one of :mod:`fastmeta.derivatives`.
        update: one of :mod:`fastmeta.updates`; it must fit the derivative (labels or example weights).
        process_group: processes that the batch is spread over, whose gradients are summed; None: this one alone, of
            which a warning tells where several run.

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
    # Whether the number of calls decides anything: it is then part of the state. A step's tensors depend on it through
    # phase() alone.
    counts = False
    # Mode of the model in the method's own passes; None: as it stands.
    mode: Literal["train", "eval"] | None = None

    def __init__(
        self, direction: DirectionRule, derivative: Derivative, update: Update, *, process_group: Group = None
    ) -> None:
        super().__init__()
        check_group(process_group)
        self.direction = direction
        self.derivative = derivative
        self.update = update
        self.process_group = process_group
        self._graphs: _Graphs | None = None  # set by fastmeta.graph
        self._calls = _Calls()

    @property
    def calls(self) -> int:
        """How often :meth:`refine` was called; for methods where it decides anything."""
        if not self.counts:
            raise AttributeError(f"a {type(self).__name__} does not count its calls")
        return self._calls.read()

    def forward(self, **batch: Any) -> Refined:
        """See :meth:`refine`."""
        return self.refine(**batch)

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

        At the last layer the examples are what the loop's own forward gave. With ``model`` they are its inputs, and the
        method makes its own passes, which leave the model as it was; methods whose ``how`` is not ``last_layer`` need
        it. A tuple is positional arguments, a mapping keyword arguments; anything else (a tensor, a list, a named
        tuple, a ``PackedSequence``, a graph) is the one argument. N is the number of rows of the model's logits.

        Args:
            unlabeled: the unlabeled examples, ``tape.outputs(logits_u)``, in the view that the loss is taken on (the
                strong one in FixMatch).
            holdout: the examples whose loss is to fall, ``tape.outputs(logits_l)``: labeled or validation examples.
            targets: their labels, int64 classes ``[Nh]`` or probabilities ``[Nh, C]``; of tokens also ``[B, T]`` or
                ``[B, T, C]``. As in ``torch.nn.functional.cross_entropy`` a class of -100 is left out, of the loss and
                of the number that its mean is over.
            index: places of the unlabeled examples in the unlabeled set ``[N]``, int64; methods with a table need it.
            labels: the labels that the loss is taken against ``[N, C]``, from another view, a teacher or a threshold;
                None: the prediction of the unlabeled logits themselves. A method that pulls the gradient back through
                the imputer needs them on the graph: hard labels with the gradient of the probabilities q are
                ``hard + (q - q.detach())``.
            mask: 0 for an unlabeled example that the training loss leaves out, else 1, ``[N]``; the mean is over all N.
            labeled: labeled examples of the training loss, where they are not the hold-out examples.
            labeled_targets: their labels.
            model: takes the examples as inputs.
            holdout_gradient: gradient of the hold-out loss by parameter name, where the loop has taken it already
                (``{name: p.grad ...}`` after the labeled backward pass) and the model has not changed since;
                ``holdout`` and ``targets`` may then be left out. It is that of the mean, or of the sum for a method
                with a hold-out loss that is one. A parameter that is missing or None has gradient 0. A loss scaler's
                factor is not seen: ``scaler.unscale_(optimizer)`` first.

        Label smoothing and class weights are soft targets of a cross-entropy, which need not sum to 1. With smoothing e
        and class weights w, ``F.cross_entropy(logits, y, weight=w, label_smoothing=e)`` has the targets
        ``w * ((1 - e) * F.one_hot(y, C) + e / C) * len(y) / w[y].sum()``.

        Returns:
            Labels ``[N, C]`` and weights ``[N]``, detached, and a loss to be added to the step's.

        Raises:
            ValueError: a shape does not fit, or something that the method needs is missing.
            TypeError: a dtype does not fit.
            IndexError: an index is outside the unlabeled set (checked on the CPU only).
        """
        return self._refine(
            Batch(
                unlabeled=unlabeled,
                holdout=holdout,
                targets=targets,
                index=index,
                labels=labels,
                mask=mask,
                labeled=labeled,
                labeled_targets=labeled_targets,
                model=model,
                holdout_gradient=holdout_gradient,
            )
        )

    def _refine(self, batch: Batch) -> Refined:
        if torch.is_inference_mode_enabled():  # where no graph could be recorded, and tables would become unusable
            with torch.inference_mode(False):
                return self._refine(batch)
        if self._graphs is not None:
            return self._graphs.refine(self, batch)
        self._check(batch)
        if not self._calls.processes_checked and not torch.compiler.is_compiling():
            self._warn_of_other_processes()
        if batch.model is not None:
            return self._refine_model(batch)
        # A GEMM of float32 must not become one of bfloat16 because the caller trains under autocast.
        with torch.autocast(as_outputs(batch.unlabeled, "unlabeled").logits.device.type, enabled=False):
            imputed = batch.imputed(self.inner_loss, self.update.needs_graph)
            with torch.no_grad():
                computed = self._step(*self._problem(imputed.detach(), batch))
            return self._finish(computed, imputed, batch)

    def _warn_of_other_processes(self) -> None:
        """Warn once where several processes run and the method knows of none.

        Outputs of a tape do not tell whether DistributedDataParallel, or what else joins gradients, wraps the model.
        """
        self._calls.processes_checked = True
        processes = 1 if self.process_group is not None else running_processes()
        if processes > 1:
            table = " and keeps a table of its own" if self.update.needs_index else ""
            warnings.warn(
                f"{type(self).__name__} has no process_group, and {processes} processes run: each refines its part of "
                f"the batch by itself{table}; process_group=torch.distributed.group.WORLD, which is None before "
                "init_process_group, refines as one process would on the joined batch",
                RuntimeWarning,
                stacklevel=4,
            )

    def _check(self, batch: Batch) -> None:
        batch.check(self.derivative.how, self.update.needs_index, self.learns(), type(self).__name__)
        if self.learns() and self._labels_are_predictions(batch) and not torch.compiler.is_compiling():
            warnings.warn(
                f"{type(self).__name__} learns no example weights from this batch: where labels are what the unlabeled "
                "logits predict, every loss is at its minimum and its gradient is 0; give labels of another view, "
                "refine(unlabeled=<strong view>, labels=<predictions on the weak view>, ...)",
                RuntimeWarning,
                stacklevel=4,
            )

    def _labels_are_predictions(self, batch: Batch) -> bool:
        return self.derivative.of_weights and batch.labels_are_predictions(self.inner_loss)

    def _problem(self, imputed: Tensor, batch: Batch) -> tuple[LastLayerProblem | None, Tensor | None, Tensor]:
        """The arguments of :meth:`_step` at the last layer."""
        index = batch.index_on(imputed.device)
        labels = self.update.labels(imputed, index)
        if not self.learns():
            return None, index, labels
        inner, weights = batch.inner_labels(labels), self.update.weights(labels, index)
        predicted = self._labels_are_predictions(batch)
        problem = batch.learned().last_layer_problem(
            inner, weights, self.process_group, labels_are_predictions=predicted
        )
        return problem, index, labels

    @torch.compiler.disable(reason=WHY_NOT_TRACED)
    def _refine_model(self, batch: Batch) -> Refined:
        """One step with the model's inputs."""
        assert batch.model is not None
        how, group = self.derivative.how, self.process_group
        function = function_of(batch.model, mode=self.mode, how=how, process_group=group)
        if self.update.needs_graph and batch.labels is not None:
            check_on_graph(batch.labels, "labels")
        rows = batch.per_example
        if batch.labels is None and (batch.learned() is not batch or not self.learns()):
            with torch.no_grad():
                logits = full_precision(function.logits(batch.unlabeled))
                Given(rows).check(logits)
                batch = replace(batch, labels=losses.prediction(logits, self.inner_loss))
                rows = {"unlabeled": logits, **rows}
        given = Given(rows, batch.view)
        batch = batch.learned()  # of the other view only the labels are used
        if self.learns() and self.derivative.how == "last_layer":
            on_graph = self.update.needs_graph and batch.labels is None
            batch = batch.outputs_of(function, on_graph)
            given.check(as_outputs(batch.unlabeled, given.view).logits)
            return self._refine(batch)
        with torch.no_grad():
            like = like_parameters(function)
            index = batch.index_on(like.device)
            labels = None if batch.labels is None else self.update.labels(batch.labels.detach().to(like), index)
            problem = self._model_problem(function, batch, given, index, labels) if self.learns() else None
            computed = self._step(problem, index, labels)
        imputed = batch.labels
        if isinstance(computed, Refined):
            imputed = computed.labels
        elif imputed is None:
            assert problem is not None, "of a gradient"
            with torch.enable_grad():
                imputed = losses.prediction(problem.logits_on_graph, self.inner_loss)
        return self._finish(computed, imputed, batch)

    def _model_problem(
        self,
        function: ModelFunction,
        batch: Batch,
        given: Given | None = None,
        index: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> WholeModelProblem:
        def impute(logits: Tensor) -> Tensor:
            return batch.inner_labels(self.update.labels(losses.prediction(logits, self.inner_loss), index))

        like = like_parameters(function)
        return batch.whole_model_problem(
            function,
            impute if labels is None else batch.inner_labels(labels),
            self.update.weights(like.new_empty(1, 0), index),  # [N]; [1] of a weight that all share, before N is known
            self.process_group,
            keep_graph=self.update.needs_graph and batch.labels is None,
            labels_are_predictions=self._labels_are_predictions(batch),
            given=Given(batch.per_example, batch.view) if given is None else given,
        )

    def _step(self, problem: Problem | None, index: Tensor | None, labels: Tensor | None) -> Refined | Tensor:
        """The part of a step that works on tensors alone: what :func:`fastmeta.graph` captures.

        It counts nothing and needs no autograd graph. Updates that need one get the gradient in :meth:`_finish`.

        Args:
            problem: of the step; None: this call learns nothing and only reads the weights.
            index: places of the examples in the unlabeled set ``[N]``.
            labels: what the update starts from ``[N, C]``; None: a pass of the step imputes them.
        """
        if problem is None:
            assert labels is not None, "imputed for a call that only reads"
            weights = self.update.weights(labels, index)
            weights = labels.new_ones(len(labels)) if weights is None else weights
            return Refined(labels, weights, labels.new_zeros(()))
        problem = self.update.enter(problem)
        gradient = self.derivative(problem, self.direction(problem))
        # Broadcasting would hide the mistake where N happens to be C, or where labels have one column.
        takes = self.update.takes
        like = labels if takes == "labels" else None
        if gradient.dim() != (1 if takes == "weights" else 2) or (like is not None and gradient.shape != like.shape):
            raise ValueError(
                f"{type(self.update).__name__} takes the gradient of "
                f"{takes if like is None else f'labels, {list(like.shape)}'}, but "
                f"{type(self.derivative).__name__} gives {list(gradient.shape)}"
            )
        if self.update.needs_graph:
            return gradient
        if labels is None:
            labels = self.update.labels(losses.prediction(problem.logits, self.inner_loss), index)
        return self.update(gradient, labels, index)

    def _finish(self, computed: Refined | Tensor, imputed: Tensor, batch: Batch) -> Refined:
        """The rest of the step: what depends on the caller's autograd graph, and the count."""
        if self.counts and self._calls.learns is None:
            self._calls.add()
        if isinstance(computed, Refined):
            return computed
        with torch.no_grad():
            index = batch.index_on(imputed.device)
            refined: Refined = self.update(computed, self.update.labels(imputed, index), index)
        return refined

    def learns(self) -> bool:
        """Whether the next call moves anything; else it only reads labels and weights."""
        return self.is_due() if self._calls.learns is None else self._calls.learns

    def is_due(self) -> bool:
        """Whether the number of calls says that the next one moves anything."""
        return True

    @contextlib.contextmanager
    def learning(self, learns: bool) -> Iterator[None]:
        """Whether calls in the block move anything, for a loop that decides it; they are not counted.

        Not All Unlabeled Data Are Equal, Algorithm 1: the steps on the model read the weights of their batches
        (``learning(False)``), and after N of them the weights of other batches learn (``learning(True)``).
        """
        before, self._calls.learns = self._calls.learns, learns
        try:
            yield
        finally:
            self._calls.learns = before

    def phase(self) -> Hashable:
        """What the number of calls decides about the next step, as a key; steps of one phase share a CUDA graph."""
        return self.learns()

    def entries(self) -> dict[str, Tensor]:
        """The number of calls."""
        return {"calls": torch.tensor(self.calls)} if self.counts else {}

    def check_entries(self, state: Mapping[str, Any]) -> list[str]:
        """See :meth:`fastmeta.state.Stateful.check_entries`."""
        if self.counts:
            entry(state, "calls", (), type(self).__name__)
        return ["calls"] if self.counts else []

    def load_entries(self, entries: Mapping[str, Tensor]) -> None:
        """See :meth:`fastmeta.state.Stateful.load_entries`."""
        if self.counts:
            self._calls.number = int(entries["calls"])
