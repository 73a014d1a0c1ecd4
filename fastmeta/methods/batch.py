"""One call of ``refine``: checked once, then made into the problem of a step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta import checks, losses
from fastmeta.capture import Outputs
from fastmeta.ops.process_group import Group
from fastmeta.problem import LastLayerProblem, Rows, WholeModelProblem
from fastmeta.problem.model_function import Inputs, ModelFunction
from fastmeta.problem.targets import Given, as_rows, check_targets

Examples = Outputs | Inputs


@dataclass(frozen=True, eq=False)
class Batch:
    """The arguments of :meth:`fastmeta.Method.refine`, where they are documented, as they were given.

    Examples are :class:`fastmeta.Outputs` of the last layer, or with ``model`` its inputs.
    """

    unlabeled: Examples
    holdout: Examples | None = None
    targets: Tensor | None = None
    index: Tensor | None = None
    labels: Tensor | None = None
    mask: Tensor | None = None
    labeled: Examples | None = None
    labeled_targets: Tensor | None = None
    model: nn.Module | None = None
    holdout_gradient: Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        for name, dimensions in (("index", 1), ("mask", 1), ("labels", 2)):
            value = getattr(self, name)
            if isinstance(value, Tensor) and value.dim() > dimensions:  # of tokens, like their logits
                with torch.enable_grad():  # the caller's labels stay on their graph
                    object.__setattr__(self, name, value.flatten(0, -dimensions))

    @property
    def per_example(self) -> dict[str, Tensor]:
        """The arguments with a row for each unlabeled example, by name."""
        rows = {"index": self.index, "labels": self.labels, "mask": self.mask}
        return {name: value for name, value in rows.items() if value is not None}

    def check(self, how: str, needs_index: bool, learns: bool, method: str) -> None:
        """Raise unless everything fits.

        Args:
            how: of the method's derivative.
            needs_index: whether the method has a table.
            learns: whether the step looks at more than the unlabeled examples.
            method: the method's name.

        Raises:
            ValueError: a shape does not fit, or something that the method needs is missing.
            TypeError: a dtype or the kind of an argument does not fit.
        """
        if self.labels is not None and not isinstance(self.labels, Tensor):
            raise TypeError(f"labels must be a tensor, got {_kind(self.labels)}")
        if self.labels is not None and not self.labels.is_floating_point():
            kind = _kind(self.labels)
            raise TypeError(f"labels must be floating [N, C], got {kind}; of classes F.one_hot(classes, C).float()")
        if self.model is not None:
            self._check_inputs(how, learns)
        else:
            self._check_outputs(how, learns)
        if self.index is None and needs_index:
            raise ValueError(f"index is needed by {method}: the examples' places in the unlabeled set, int64 [N]")
        if self.index is not None and (not isinstance(self.index, Tensor) or self.index.dtype != torch.int64):
            raise TypeError(f"index must be an int64 tensor, got {_kind(self.index)}")
        if self.mask is not None and not isinstance(self.mask, Tensor):
            raise TypeError(f"mask must be a tensor, got {type(self.mask).__name__}")
        self._check_counts()

    def _check_counts(self) -> None:
        """Raise unless all arguments with a row for each unlabeled example have the same N.

        N is a number of rows of the logits. Before a model has run, these arguments alone tell it.
        """
        count, source = None, "unlabeled"
        if isinstance(self.unlabeled, Outputs):
            count = len(self.unlabeled.logits)
        for name, value in self.per_example.items():
            flat = name in ("index", "mask") or (name == "pseudo_labels" and value.dim() == 1)
            wanted = "[N]" if flat else "[N, C]"
            if count is not None:
                wanted += f" = [{count}] like {source}" if flat else f" = [{count}, C] like {source}"
            if value.dim() != (1 if flat else 2) or (count is not None and len(value) != count):
                raise ValueError(f"{name} must be {wanted}, got {list(value.shape)}")
            if count is None:
                count, source = len(value), name

    def _check_outputs(self, how: str, learns: bool) -> None:
        """Check outputs of the last layer."""
        if self.holdout_gradient is not None:
            raise ValueError("holdout_gradient must be None without model")
        if how != "last_layer":
            raise ValueError(f"model is needed by how={how!r}: refine(model=model, unlabeled=inputs, ...), got None")
        logits = as_outputs(self.unlabeled, "unlabeled").logits
        if self.labels is not None:
            checks.shaped(self.labels, "labels", "[N, C]", logits.shape)
        if not learns:
            return
        unlabeled = check_rows(self.unlabeled, "unlabeled")
        holdout = check_rows(self.holdout, "holdout", unlabeled)
        if (self.labeled is None) != (self.labeled_targets is None):
            raise ValueError("labeled and labeled_targets must be given together")
        if self.labeled is not None:
            check_targets(
                self.labeled_targets, check_rows(self.labeled, "labeled", unlabeled).logits, "labeled_targets"
            )
        check_targets(self.targets, holdout.logits, "targets")

    def _check_inputs(self, how: str, learns: bool) -> None:
        """Check inputs of a model, before the model runs."""
        if how == "last_layer" and self.holdout_gradient is not None:
            raise ValueError("holdout_gradient must be None for how='last_layer', which takes it in closed form")
        for name in ("unlabeled", "holdout", "labeled"):
            if isinstance(getattr(self, name), Outputs):
                raise TypeError(f"{name} must be inputs of the model where model is given, got Outputs")
        if self.unlabeled is None:
            raise TypeError("unlabeled must be inputs of the model, got None")
        for pair in (("holdout", "targets"), ("labeled", "labeled_targets")):
            missing = [name for name in pair if getattr(self, name) is None]
            if len(missing) == 1:
                raise ValueError(f"{' and '.join(pair)} must be given together, got {missing[0]}=None")
        if learns and self.holdout is None and self.holdout_gradient is None:
            raise ValueError("holdout must be inputs of the model, or holdout_gradient given, got None")
        for name in ("targets", "labeled_targets"):
            targets = getattr(self, name)
            if targets is None:
                continue
            checks.target_kind(targets, name)
            if targets.dim() < (2 if targets.is_floating_point() else 1):
                got = f"{_kind(targets)} {list(targets.shape)}"
                hint = f"use {name}.unsqueeze(1) for one output, {name}.long() for classes"
                raise ValueError(f"{name} must be [N, C] probabilities or [N] int64 classes, got {got}; {hint}")

    def imputed(self, loss: str, on_graph: bool) -> Tensor:
        """Imputed labels ``[N, C]`` in float32 or float64: those given, or what the last layer predicts."""
        logits = as_outputs(self.unlabeled, "unlabeled").logits
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        # A caller under torch.no_grad may have logits that are on the graph.
        with torch.set_grad_enabled(on_graph):
            if self.labels is None:
                name, imputed = "unlabeled.logits", losses.prediction(logits.to(dtype), loss)
            else:
                name, imputed = "labels", self.labels.to(dtype)
        return check_on_graph(imputed, name) if on_graph else imputed.detach()

    def index_on(self, device: torch.device) -> Tensor | None:
        """The examples' places in the unlabeled set ``[N]``."""
        return None if self.index is None else self.index.to(device, non_blocking=True)

    def learned(self) -> "Batch":
        """The batch in the view that the unlabeled loss is taken on."""
        return self

    @property
    def view(self) -> str:
        """The argument that view is given as."""
        return "unlabeled"

    def inner_labels(self, labels: Tensor) -> Tensor:
        """Labels of the unlabeled loss ``[N, C]``, made from the labels that the update starts from."""
        return labels

    def labels_are_predictions(self, loss: str) -> bool:
        """Whether the unlabeled loss is taken between logits and their own prediction, where it has no gradient."""
        if self.labels is None:
            return True
        return isinstance(self.unlabeled, Outputs) and _is_prediction(self.labels, self.unlabeled.logits, loss)

    def outputs_of(self, function: ModelFunction, on_graph: bool) -> "Batch":
        """The batch at the last layer, by a pass of the model over each of its views.

        Args:
            function: the model.
            on_graph: whether the unlabeled outputs are on the graph of its parameters.
        """

        def outputs(inputs: Examples | None) -> Outputs | None:
            return None if inputs is None else function.outputs(inputs)

        unlabeled = function.outputs(self.unlabeled, on_graph=on_graph)
        return replace(
            self, unlabeled=unlabeled, holdout=outputs(self.holdout), labeled=outputs(self.labeled), model=None
        )

    def last_layer_problem(
        self, labels: Tensor, weights: Tensor | None, group: Group, *, labels_are_predictions: bool
    ) -> LastLayerProblem:
        """The step's problem, everything detached and in the dtype of the labels ``[N, C]`` of the inner loss."""
        unlabeled = as_outputs(self.unlabeled, "unlabeled")
        dtype = labels.dtype
        holdout = _rows(as_outputs(self.holdout, "holdout"), dtype)
        labeled = None if self.labeled is None else _rows(as_outputs(self.labeled, "labeled"), dtype)
        return LastLayerProblem(
            unlabeled=_rows(unlabeled, dtype),
            labels=labels,
            holdout=holdout,
            targets=_targets(self.targets, holdout),
            weights=weights,
            mask=None if self.mask is None else self.mask.detach().to(labels),
            labeled=labeled,
            labeled_targets=None if labeled is None else _targets(self.labeled_targets, labeled),
            has_bias=unlabeled.bias is not None,
            process_group=group,
            labels_are_predictions=labels_are_predictions,
        )

    def whole_model_problem(
        self,
        function: ModelFunction,
        impute: Tensor | Callable[[Tensor], Tensor],
        weights: Tensor | None,
        group: Group,
        *,
        keep_graph: bool,
        labels_are_predictions: bool,
        given: Given,
    ) -> WholeModelProblem:
        """The step's problem; :class:`WholeModelProblem` has the arguments."""
        gradient = self.holdout_gradient
        return WholeModelProblem(
            function,
            unlabeled=self.unlabeled,
            impute=impute,
            holdout=self.holdout,
            targets=self.targets,
            weights=weights,
            mask=None if self.mask is None else self.mask.to(like_parameters(function)),
            labeled=self.labeled,
            labeled_targets=self.labeled_targets,
            process_group=group,
            holdout_gradient=None if gradient is None else function.check_gradient(gradient, "holdout_gradient"),
            keep_graph=keep_graph,
            labels_are_predictions=labels_are_predictions,
            given=given,
        )


def like_parameters(function: ModelFunction) -> Tensor:
    """An empty tensor of the dtype, float32 or float64, and device that a step with this model works in."""
    first = next(iter(function.parameters.values()))
    return torch.empty(0, dtype=torch.float64 if first.dtype == torch.float64 else torch.float32, device=first.device)


def check_on_graph(imputed: Tensor, name: str) -> Tensor:
    """Raise unless the imputed labels are on the graph of autograd."""
    if not imputed.requires_grad:
        raise ValueError(
            f"{name} must be on the graph, got a tensor without one (of torch.no_grad, inference_mode or detach): this "
            "method pulls the gradient back through the imputer. Run the view that the labels come from with a graph, "
            "or take a method that needs none, such as L2I('V1') or MetaGradient"
        )
    return imputed


def _is_prediction(labels: Tensor, logits: Tensor, loss: str) -> bool:
    """Whether autograd's graph says that the labels are ``softmax(logits)``, where that is the loss's prediction."""
    source = _before_casts(logits.grad_fn, logits.output_nr)
    node = _before_casts(labels.grad_fn, labels.output_nr)[0]
    if source[0] is None or node is None or node.name() != "SoftmaxBackward0" or not losses.of(loss).has_softmax:
        return False
    return _before_casts(*node.next_functions[0]) == source


def _before_casts(node: Any, place: int) -> tuple[Any, int]:
    while node is not None and node.name() == "ToCopyBackward0":
        node, place = node.next_functions[0]
    return node, place


def as_outputs(outputs: object, name: str) -> Outputs:
    """Raise unless it is :class:`fastmeta.Outputs`."""
    if not isinstance(outputs, Outputs):
        got = type(outputs).__name__
        raise TypeError(
            f"{name} must be Outputs, from tape.outputs(logits), or inputs together with model=..., got {got}"
        )
    return outputs


def check_rows(given: object, name: str, like: Outputs | None = None) -> Outputs:
    """Features ``[N, D]`` and logits ``[N, C]`` that fit each other and those of ``like``."""
    outputs = as_outputs(given, name)
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
    return outputs


def _rows(outputs: Outputs, dtype: torch.dtype) -> Rows:
    return Rows(outputs.features.detach().to(dtype), outputs.logits.detach().to(dtype))


def _targets(targets: object, of: Rows) -> Tensor:
    """Targets with a row for each of these: probabilities in their dtype, or classes."""
    rows: Tensor = as_rows(targets, len(of.logits))
    return rows.detach().to(of.logits.dtype) if rows.is_floating_point() else rows


def _kind(value: object) -> object:
    return value.dtype if isinstance(value, Tensor) else type(value).__name__
