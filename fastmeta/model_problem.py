"""The inner and outer problem of one step where the whole model moves; see :mod:`fastmeta.problem`."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastmeta import losses
from fastmeta.model_function import Inputs, LossOfLogits, ModelFunction, Term, Vector
from fastmeta.problem import Part, Reduction, one_over, product_of
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
        term = self._term(part, loss, reduction)
        if part == "unlabeled" and self.keep_graph:
            return self._joined(self.function.gradient_at(self.logits_on_graph, term.loss))
        gradient, _ = self.function.gradient(term.inputs, term.loss, self.parameters)
        return self._joined(gradient)

    def moved(self, direction: Vector, rate: float) -> "ModelProblem":
        """The same problem at ``theta - rate v``."""
        names = list(direction)
        values = torch._foreach_add([self.parameters[name] for name in names], list(direction.values()), alpha=-rate)
        return ModelProblem(
            self.function,
            self.unlabeled,
            self.impute,
            self.holdout,
            self.targets,
            self.weights,
            self.mask,
            self.labeled,
            self.labeled_targets,
            {**self.parameters, **dict(zip(names, values, strict=True))},
            self.process_group,
            start=self if self.start is None else self.start,
        )

    def hessian(
        self,
        *,
        loss: str,
        reduction: Reduction = "mean",
        labeled_weight: float = 0.0,
        labeled_loss: str = "cross_entropy",
    ) -> Callable[[Vector], Vector]:
        """The product with the Hessian of ``C^U + labeled_weight C^T`` at theta."""
        terms = [self._term("unlabeled", loss, reduction)]
        if labeled_weight:
            labeled = self._term("labeled", labeled_loss, reduction)
            terms.append(Term(labeled.inputs, lambda logits: labeled_weight * labeled.loss(logits)))
        product = self.function.hessian(terms, self.parameters)
        return lambda direction: self._joined(product(direction))

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

    def _term(self, part: Part, loss: str, reduction: Reduction) -> Term:
        if part == "unlabeled":
            return Term(self.unlabeled, self._inner_loss(loss, reduction))
        inputs, targets = self.holdout_inputs() if part == "holdout" else self.labeled_inputs()

        def outer(logits: Tensor) -> Tensor:
            logits = full_precision(logits)
            probabilities = losses.as_probabilities(targets, logits.shape[1], logits.dtype).to(logits.dtype)
            return self._reduced(losses.loss_per_example(logits, probabilities, loss), reduction)

        return Term(inputs, outer)

    def _inner_loss(self, loss: str, reduction: Reduction) -> LossOfLogits:
        def inner(logits: Tensor) -> Tensor:
            logits = self.see(logits)
            per_example = losses.loss_per_example(logits, self.labels.to(logits.dtype), loss)
            weights = self.inner_weights
            return self._reduced(per_example if weights is None else weights * per_example, reduction)

        return inner

    def _reduced(self, per_example: Tensor, reduction: Reduction) -> Tensor:
        total = per_example.sum()
        return total * self.mean_scale(len(per_example)) if reduction == "mean" else total

    def _joined(self, gradient: Vector) -> Vector:
        if self.process_group is None:
            return gradient
        return dict(zip(gradient, sum_over(list(gradient.values()), self.process_group), strict=True))


def full_precision(logits: Tensor) -> Tensor:
    """float32 in place of half precision; the losses of a model under autocast."""
    return logits if logits.dtype == torch.float64 else logits.float()
