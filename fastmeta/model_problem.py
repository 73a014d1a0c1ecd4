"""The inner and outer problem of one step where the whole model moves; see :mod:`fastmeta.problem`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastmeta import checks, losses
from fastmeta.model_function import Inputs, ModelFunction, Term, Vector
from fastmeta.problem import AnyDirection, Curvature, InnerLoss, Part, Problem, Reduction, one_over, product_of
from fastmeta.process_group import Group, sum_over


@dataclass(frozen=True)
class ModelProblem:
    """One step of the whole model.

    Args:
        function: the model.
        unlabeled: inputs of the inner loss.
        impute: imputed labels ``z [N, C]``, detached, or a rule that makes them of the unlabeled logits at theta; then
            they come out of the first pass that is made anyway.
        holdout: inputs of the outer loss; None where its gradient is given and no other is asked for.
        targets: their labels, probabilities ``[Nh, C]`` or int64 classes ``[Nh]``.
        weights: example weights ``w [N]``; None means 1.
        mask: ``m [N]``, 0 for an example that the inner loss leaves out; None means 1.
        labeled: labeled inputs of the inner loss (C^T), where a direction uses them; None: the hold-out inputs.
        labeled_targets: their labels.
        parameters: theta; None: the model's own.
        process_group: the processes that the batch is spread over; None: this one alone.
        holdout_gradient: gradient of the mean outer loss at theta over all processes, where the caller has it already.
        keep_graph: the unlabeled logits are wanted on the graph of the model's own parameters, theta; they come out of
            the first pass that is made anyway.
    """

    function: ModelFunction
    unlabeled: Inputs
    impute: Tensor | Callable[[Tensor], Tensor]
    holdout: Inputs | None
    targets: Tensor | None
    weights: Tensor | None = None
    mask: Tensor | None = None
    labeled: Inputs | None = None
    labeled_targets: Tensor | None = None
    parameters: Vector = field(default_factory=dict)
    process_group: Group = None
    holdout_gradient: Vector | None = None
    keep_graph: bool = False
    moving: tuple[str, ...] | None = None  # names of the parameters that move; None: all
    start: "ModelProblem | None" = None  # the problem at theta_0 that this one was moved from
    _seen: dict[str, Tensor] = field(default_factory=dict)  # unlabeled logits and labels at theta

    def __post_init__(self) -> None:
        if not self.parameters:
            object.__setattr__(self, "parameters", self.function.parameters)

    @property
    def labels(self) -> Tensor:
        """Imputed labels ``z [N, C]``, those of the start of the inner steps."""
        if self.start is not None:
            return self.start.labels
        if isinstance(self.impute, Tensor):
            return self.impute
        if "labels" not in self._seen:
            self._seen["labels"] = self.impute(self.logits)
        return self._seen["labels"]

    @property
    def logits(self) -> Tensor:
        """Unlabeled logits ``[N, C]`` at theta, detached; run once."""
        if "logits" not in self._seen:
            with torch.no_grad():
                self.see(self.function.logits(self.unlabeled, self.parameters))
        return self._seen["logits"]

    def see(self, logits: Tensor) -> Tensor:
        """Keep the unlabeled logits of a pass at theta, so that nothing is run twice; returns them in full precision.

        Args:
            logits: ``[N, C]``.
        """
        logits = full_precision(logits)
        self._seen.setdefault("logits", logits.detach())
        return logits

    @property
    def keep(self) -> Callable[[Tensor], None] | None:
        """Takes unlabeled logits of a pass at theta on the graph of the model's own parameters; None: not wanted."""
        if not self.keep_graph or "graph" in self._seen:
            return None
        return lambda logits: self._seen.update(graph=logits)

    @property
    def logits_on_graph(self) -> Tensor:
        """Unlabeled logits ``[N, C]`` at theta on the graph of the model's own parameters; run once."""
        if "graph" not in self._seen:
            self._seen["graph"] = self.function.logits(self.unlabeled, on_graph=True)
        return full_precision(self._seen["graph"])

    @property
    def inner_weights(self) -> Tensor | None:
        """``m_i w_i``, ``[N]``; None means 1."""
        return product_of(self.weights, self.mask)

    def gradient(self, part: Part, *, loss: str, reduction: Reduction = "mean") -> Vector:
        """Gradient of the loss of the hold-out examples, of C^U (``unlabeled``) or of C^T (``labeled``)."""
        if self.holdout_gradient is not None and (part == "holdout" or (part == "labeled" and self.labeled is None)):
            return self.holdout_gradient
        term = self.term(part, loss, reduction)
        if part == "unlabeled" and self.keep_graph:
            gradient = self.function.gradient_at(self.logits_on_graph, term.loss)
            return self._joined({name: gradient[name] for name in self.names})
        gradient, _ = self.function.gradient(term.inputs, term.loss, self.parameters, self.names)
        return self._joined(gradient)

    def moved(self, direction: AnyDirection, rate: float) -> "ModelProblem":
        """The same problem at ``theta - rate v``."""
        step = of_model(direction)
        values = torch._foreach_add([self.parameters[name] for name in step], list(step.values()), alpha=-rate)
        return replace(
            self,
            parameters={**self.parameters, **dict(zip(step, values, strict=True))},
            holdout_gradient=None,
            keep_graph=False,
            start=self if self.start is None else self.start,
            _seen={},
        )

    def restricted(self, layers: Sequence[str]) -> "ModelProblem":
        """The same problem where only the parameters of some layers move.

        Args:
            layers: names of modules or parameters, ``("block4", "fc")``.

        Raises:
            ValueError: nothing that moves has one of these names.
        """
        if not layers:
            raise ValueError("layers must name at least one part of the model, got none")
        for layer in layers:
            if not any(_within(name, layer) for name in self.names):
                raise ValueError(f"layers must name parts of the model that require grad, got {layer!r}")
        moving = tuple(name for name in self.names if any(_within(name, layer) for layer in layers))
        gradient = self.holdout_gradient
        return replace(
            self,
            moving=moving,
            holdout_gradient=None if gradient is None else {name: gradient[name] for name in moving},
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that move."""
        return tuple(self.parameters) if self.moving is None else self.moving

    def hessian_vector_product(self, inner: InnerLoss, direction: AnyDirection) -> Vector:
        """One product with the Hessian of the inner loss at theta; no graph is left, one term's at a time lives."""
        v = of_model(direction)
        total: list[Tensor] = []
        for term in self._terms(inner):
            product = self.function.hessian([term], self.parameters, self.names, once=True)(v)
            values = list(product.values())
            total = list(torch._foreach_add(total, values)) if total else values
        return self._joined(dict(zip(self.names, total, strict=True)))

    def hessian(self, inner: InnerLoss, curvature: Curvature = "hessian") -> Callable[[AnyDirection], Vector]:
        """The product with the Hessian of the inner loss at theta, or with its Gauss-Newton matrix; for many products.

        A graph is built once and kept: of the gradient, or of the logits alone.
        """
        build = self.function.hessian if curvature == "hessian" else self.function.gauss_newton
        product = build(self._terms(inner), self.parameters, self.names)
        return lambda direction: self._joined(product(of_model(direction)))

    def mean_scale(self, count: int) -> float | Tensor:
        """``1 / N`` for this process's ``count`` of the N examples of the joined batch."""
        return one_over(count, self.process_group, next(iter(self.parameters.values())).device)

    def labeled_inputs(self) -> tuple[Inputs, Tensor]:
        """The labeled examples of the inner loss and their targets."""
        if self.labeled is None or self.labeled_targets is None:
            return self.holdout_inputs()
        return self.labeled, self.labeled_targets

    def holdout_inputs(self) -> tuple[Inputs, Tensor]:
        """The hold-out examples and their targets.

        Raises:
            ValueError: there are none.
        """
        if self.holdout is None or self.targets is None:
            raise ValueError("holdout and targets are needed by this direction, got None")
        return self.holdout, self.targets

    def _terms(self, inner: InnerLoss) -> list[Term]:
        return [self.term(part, loss, inner.reduction, factor) for part, loss, factor in inner.terms()]

    def term(self, part: Part, loss: str, reduction: Reduction, factor: float = 1.0) -> Term:
        """A reduced loss times ``factor``, as a summand of an objective."""
        unlabeled = part == "unlabeled"
        inputs, given = (self.unlabeled, None) if unlabeled else self._labels_of(part)
        weights = self.inner_weights if unlabeled else None

        def targets(logits: Tensor) -> Tensor:
            return probabilities(self.labels if given is None else given, logits)

        @cache  # the processes count their examples once a term, not once a product
        def scale(count: int) -> float | Tensor:
            return factor * self.mean_scale(count) if reduction == "mean" else factor

        def weighted(rows: Tensor) -> Tensor:
            each = scale(len(rows))
            return rows * each if weights is None else rows * (each * weights).view(-1, *[1] * (rows.dim() - 1))

        def value(logits: Tensor) -> Tensor:
            logits = self.see(logits) if unlabeled else full_precision(logits)
            return weighted(losses.loss_per_example(logits, targets(logits), loss)).sum()

        def curvature(logits: Tensor, tangent: Tensor) -> Tensor:
            logits = self.see(logits) if unlabeled else full_precision(logits)
            return weighted(losses.gauss_newton(logits, targets(logits), full_precision(tangent), loss))

        return Term(inputs, value, curvature)

    def _labels_of(self, part: Part) -> tuple[Inputs, Tensor]:
        return self.holdout_inputs() if part == "holdout" else self.labeled_inputs()

    def _joined(self, gradient: Vector) -> Vector:
        if self.process_group is None:
            return gradient
        return dict(zip(gradient, sum_over(list(gradient.values()), self.process_group), strict=True))


AnyProblem: TypeAlias = Problem | ModelProblem


class Trajectory(NamedTuple):
    """The K inner steps that one outer gradient goes back through: where each was taken, and its direction.

    The derivative of the outer loss is the sum of the derivatives of the steps.
    """

    steps: tuple[tuple[AnyProblem, AnyDirection], ...]


def of_model(direction: AnyDirection) -> Vector:
    """Itself.

    Raises:
        TypeError: it is a last layer's.
    """
    if not isinstance(direction, dict):
        raise TypeError(f"direction must be a whole model's dict by parameter name, got {type(direction).__name__}")
    return direction


def _within(name: str, layer: str) -> bool:
    return name == layer or name.startswith(f"{layer}.")


def probabilities(targets: Tensor, logits: Tensor) -> Tensor:
    """Targets ``[N]`` or ``[N, C]`` of logits ``[N, C]``, checked, as probabilities in their dtype. ``[N, C]``."""
    if isinstance(targets, Tensor) and targets.is_floating_point():
        targets = targets.to(logits.dtype)
    checked = checks.targets(targets, logits, logits.shape[1])
    return losses.as_probabilities(checked, logits.shape[1], logits.dtype)


def full_precision(logits: Tensor) -> Tensor:
    """float32 in place of half precision; the losses of a model under autocast."""
    return logits if logits.dtype == torch.float64 else logits.float()
