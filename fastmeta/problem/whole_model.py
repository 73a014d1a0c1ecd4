"""The problem of one step where the whole model moves; see :mod:`fastmeta.problem`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fastmeta import losses
from fastmeta.ops.perturbed import perturbed
from fastmeta.ops.process_group import Group
from fastmeta.problem.base import Curvature, How, InnerLoss, Part, ProblemBase, Reduction, full_precision
from fastmeta.problem.direction import AnyDirection, Vector, of_model
from fastmeta.problem.model_function import Inputs, ModelFunction, Term
from fastmeta.problem.targets import NOTHING_GIVEN, Given, Kept, probabilities, read
from fastmeta.problem.unlabeled_pass import UnlabeledPass

_LAST_LAYER_ALONE = "factored and bias=False are for the last layer alone, got a whole model"


@dataclass(frozen=True)
class WholeModelProblem(ProblemBase):
    """One step of the whole model.

    Args:
        function: the model.
        unlabeled: inputs of the inner loss.
        impute: imputed labels ``z [N, C]``, detached, or a function that makes them from the unlabeled logits at theta,
            once the first pass has given these.
        holdout: inputs of the outer loss; None where its gradient is given and no other is asked for.
        targets: their labels, probabilities ``[Nh, C]`` or int64 classes ``[Nh]``.
        weights: example weights ``w [N]``; None means 1.
        mask: ``m [N]``, 0 for an example that the inner loss leaves out; None means 1.
        labeled: labeled inputs of the inner loss (C^T), where a direction uses them; None: the hold-out inputs.
        labeled_targets: their labels.
        parameters: theta; None: the model's own.
        process_group: the processes that the batch is spread over; None: this one alone.
        holdout_gradient: gradient of the mean outer loss at theta over all processes, where the caller has it already.
        keep_graph: whether the first pass keeps the unlabeled logits on the graph of the model's own parameters, theta.
        labels_are_predictions: whether the labels are what these very logits predict: every example's loss then has no
            gradient, and a derivative of it would be rounding noise.
        given: what must fit the unlabeled logits, which alone say what N is.
        how: how derivatives along a direction are taken, see :func:`fastmeta.label_gradient`; set by :meth:`by`.
        radius: length of the perturbation of a difference.
    """

    function: ModelFunction
    unlabeled: Inputs
    impute: Tensor | Callable[[Tensor], Tensor]
    holdout: Inputs | None = None
    targets: Tensor | None = None
    weights: Tensor | None = None
    mask: Tensor | None = None
    labeled: Inputs | None = None
    labeled_targets: Tensor | None = None
    parameters: Vector = field(default_factory=dict)
    process_group: Group = None
    holdout_gradient: Vector | None = None
    keep_graph: bool = False
    labels_are_predictions: bool = False
    given: Given = NOTHING_GIVEN
    how: How = "jvp"
    radius: float = 0.01
    moving: tuple[str, ...] | None = None  # names of the parameters that move; None: all
    start: "WholeModelProblem | None" = None  # the problem at theta_0 that this one was moved from
    seen: UnlabeledPass = field(default_factory=UnlabeledPass, repr=False)

    def __post_init__(self) -> None:
        if not self.parameters:
            object.__setattr__(self, "parameters", self.function.parameters)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(iter(self.parameters.values())).device

    @property
    def last_layer(self) -> None:
        """None: the Hessian of a whole model is known by its products alone; see :class:`LastLayerProblem`."""
        return None

    @property
    def labels(self) -> Tensor:
        """Imputed labels ``z [N, C]``, made at the start of the inner steps."""
        if self.start is not None:
            return self.start.labels
        if not callable(self.impute):
            return self.impute
        if self.seen.labels is None:
            self.seen.labels = self.impute(self.logits)
        return self.seen.labels

    @property
    def logits(self) -> Tensor:
        """Unlabeled logits ``[N, C]`` at theta, detached; run once."""
        if self.seen.logits is None:
            with torch.no_grad():
                self._see(self.function.logits(self.unlabeled, self.parameters))
        assert self.seen.logits is not None
        return self.seen.logits

    @property
    def logits_on_graph(self) -> Tensor:
        """Unlabeled logits ``[N, C]`` at theta on the graph of the model's own parameters; run once."""
        if self.seen.on_graph is None:
            self.seen.on_graph = self.function.logits(self.unlabeled, on_graph=True)
        return self._see(self.seen.on_graph)

    def gradient(self, part: Part, *, loss: str, reduction: Reduction = "mean", bias: bool = True) -> Vector:
        """Gradient of the loss of the hold-out examples, of C^U (``unlabeled``) or of C^T (``labeled``).

        Raises:
            ValueError: ``bias=False``, which is for the last layer alone.
        """
        if not bias:
            raise ValueError(_LAST_LAYER_ALONE)
        if self.holdout_gradient is not None and (part == "holdout" or (part == "labeled" and self.labeled is None)):
            return self.holdout_gradient
        term = self.term(part, loss, reduction)
        if part == "unlabeled" and self.keep_graph:
            gradient = self.function.gradient_at(self.logits_on_graph, term.loss)
            return self._joined({name: gradient[name] for name in self.names})
        gradient, _ = self.function.gradient(term.inputs, term.loss, self.parameters, self.names)
        return self._joined(gradient)

    def gradient_in_factors(self, part: Part, *, loss: str, reduction: Reduction, bias: bool) -> Vector:
        """Raises ValueError: it is for the last layer alone."""
        raise ValueError(_LAST_LAYER_ALONE)

    def moved(self, direction: AnyDirection, rate: float) -> "WholeModelProblem":
        """The same problem at ``theta - rate v``."""
        step = of_model(direction)
        values = torch._foreach_add([self.parameters[name] for name in step], list(step.values()), alpha=-rate)
        return replace(
            self,
            parameters={**self.parameters, **dict(zip(step, values, strict=True))},
            holdout_gradient=None,
            keep_graph=False,
            labels_are_predictions=False,
            start=self if self.start is None else self.start,
            seen=UnlabeledPass(),
        )

    def restricted(self, layers: Sequence[str]) -> "WholeModelProblem":
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
        """One product with the Hessian of the inner loss at theta; at most one term's graph is in memory."""
        v = of_model(direction)
        total: list[Tensor] = []
        for term in self._terms(inner):
            product = self.function.hessian([term], self.parameters, self.names, once=True)(v)
            values = list(product.values())
            total = list(torch._foreach_add(total, values)) if total else values
        return self._joined(dict(zip(self.names, total, strict=True)))

    def hessian(self, inner: InnerLoss, curvature: Curvature = "hessian") -> Callable[[AnyDirection], Vector]:
        """The product with the Hessian of the inner loss at theta, or with its Gauss-Newton matrix; for many products.

        One graph is built and kept: the gradient's for the Hessian, the logits' for Gauss-Newton.
        """
        build = self.function.hessian if curvature == "hessian" else self.function.gauss_newton
        product = build(self._terms(inner), self.parameters, self.names)
        return lambda direction: self._joined(product(of_model(direction)))

    def by(self, how: How, radius: float) -> "WholeModelProblem":
        """The same problem whose derivatives along a direction are taken in another way.

        Raises:
            ValueError: ``how`` is ``last_layer``.
        """
        if how == "last_layer":
            raise ValueError("how='last_layer' needs a LastLayerProblem, got a whole model")
        return replace(self, how=how, radius=radius)

    def label_tangent(
        self, direction: AnyDirection, *, loss: str, rate: float = 1.0, reduction: Reduction = "sum"
    ) -> Tensor:
        """``(rate / B) T_i(v)``, ``T = D_v(-dl/dz)`` (``B = 1`` for a sum). ``[N, C]``."""
        tangent = self._label_tangent(of_model(direction), loss)
        return self.step_scale(rate, reduction, len(tangent)) * tangent

    def _label_tangent(self, v: Vector, loss: str) -> Tensor:
        if self.how == "double_backward":
            leaf, _, total, theta = self._twice(loss)
            return -self._mixed(total, theta, v, [leaf])[0]
        reads = losses.of(loss).label_tangent_reads_targets

        def labels(logits: Tensor) -> Tensor | None:
            return probabilities(self.labels, logits, loss) if reads else None

        if self.how == "jvp":
            logits, tangent = self._jvp(v, self.keep_graph)
            return losses.label_tangent(logits, tangent, loss, labels(logits))
        if reads:
            self._impute_first()
        return self._difference(lambda f: losses.label_pull(f, loss, labels(f)), v, self.keep_graph)

    def loss_tangent(self, direction: AnyDirection, *, loss: str) -> Tensor:
        """``D_v l_i``. ``[N]``."""
        v = of_model(direction)
        if self.how == "double_backward":
            _, weights, total, theta = self._twice(loss)
            return self._mixed(total, theta, v, [weights])[0]
        if self.how == "jvp":
            logits, tangent = self._jvp(v)
            return (losses.residual(logits, probabilities(self.labels, logits, loss), loss) * tangent).sum(-1)
        self._impute_first()
        return self._difference(
            lambda logits: losses.loss_per_example(logits, probabilities(self.labels, logits, loss), loss), v
        )

    def label_and_loss_tangent(self, direction: AnyDirection, *, loss: str) -> tuple[Tensor, Tensor]:
        """:meth:`label_tangent` ``[N, C]`` and :meth:`loss_tangent` ``[N]`` of one pass, or one set of passes."""
        v = of_model(direction)
        if self.how == "double_backward":
            labels, weights, total, theta = self._twice(loss)
            pulls, slopes = self._mixed(total, theta, v, [labels, weights])
            return -pulls, slopes
        if self.how == "jvp":
            logits, tangent = self._jvp(v, self.keep_graph)
            labels = probabilities(self.labels, logits, loss)
            slopes = (losses.residual(logits, labels, loss) * tangent).sum(-1)
            return losses.label_tangent(logits, tangent, loss, labels), slopes
        self._impute_first()

        def both(logits: Tensor) -> Tensor:
            labels = probabilities(self.labels, logits, loss)
            values = losses.loss_per_example(logits, labels, loss)
            return torch.cat([losses.label_pull(logits, loss, labels), values.unsqueeze(-1)], dim=1)

        columns = self._difference(both, v)
        return columns[:, :-1], columns[:, -1]

    def probes(self, direction: AnyDirection, radius: float) -> tuple[Tensor, Tensor, Tensor]:
        """Logits ``[N, C]`` at ``theta + epsilon v`` and at ``theta - epsilon v``, and epsilon ``= radius / ||v||``.

        A one-sided difference has the logits at ``theta + epsilon v`` and at theta, and returns ``epsilon / 2``: half
        the distance between the two.
        """
        v = of_model(direction)
        one_sided = self.how == "forward_difference"
        minus = self.logits if one_sided else None  # run before anything is moved
        with torch.no_grad(), self._perturbed(v, radius) as perturbation:
            plus = self._probe()
            if minus is None:
                perturbation.flip()
                minus = self._probe()
        return plus, minus, perturbation.epsilon / 2 if one_sided else perturbation.epsilon

    def feature_similarity(self, direction: AnyDirection, *, bias: bool, rate: float, reduction: Reduction) -> Tensor:
        """Raises TypeError: only a last layer has it."""
        raise TypeError("direction must be Factors, of a last layer, got that of a whole model")

    def _twice(self, loss: str) -> tuple[Tensor, Tensor, Tensor, Vector]:
        """Labels, weights and theta as leaves, and the sum of the weighted losses, to be differentiated twice."""
        theta = {name: value.detach().requires_grad_() for name, value in self.parameters.items()}
        with torch.enable_grad():
            logits = self._see(self.function.logits(self.unlabeled, theta, twice=True))
            labels = probabilities(self.labels, logits, loss).detach().clone().requires_grad_()
            weights = logits.new_ones(len(logits)).requires_grad_()
            total = (weights * losses.loss_per_example(logits, labels, loss)).sum()
        return labels, weights, total, theta

    def _mixed(self, total: Tensor, theta: Vector, v: Vector, of: list[Tensor]) -> tuple[Tensor, ...]:
        """``d/d of <grad_theta total, v>``: the definition, by differentiating twice."""
        moving = {name: theta[name] for name in v}
        gradient = self.function.differentiated([total], theta, moving, create_graph=True)
        by = {str(place): tensor for place, tensor in enumerate(of)}
        return tuple(self.function.differentiated(list(gradient.values()), theta, by, list(v.values())).values())

    def _jvp(self, v: Vector, keep_graph: bool = False) -> tuple[Tensor, Tensor]:
        """Unlabeled logits, detached, and ``D_v f`` of one pass of forward mode; both ``[N, C]``."""
        keep = keep_graph and self.seen.on_graph is None
        logits, tangent = self.function.jvp(self.unlabeled, v, self.parameters, on_graph=keep)
        if keep:
            self.seen.on_graph = logits
        return self._see(logits.detach()), full_precision(tangent)

    def _difference(self, of: Callable[[Tensor], Tensor], v: Vector, keep_graph: bool = False) -> Tensor:
        """``(of(theta + epsilon v) - of(theta - epsilon v)) / 2 epsilon``, or one-sided from theta, in place.

        Args:
            of: of the unlabeled logits ``[N, C]``, in full precision.
            v: by name.
            keep_graph: whether a pass at theta keeps its logits on the graph.
        """
        function, theta = self.function, self.parameters
        with torch.no_grad():
            start = None
            if self.how == "forward_difference":
                keep = keep_graph and self.seen.on_graph is None
                logits = function.logits(self.unlabeled, None if keep else theta, on_graph=keep)
                if keep:
                    self.seen.on_graph = logits
                start = of(self._see(logits.detach()))
            with self._perturbed(v, self.radius) as perturbation:
                plus = of(self._probe())
                if start is None:
                    perturbation.flip()
                    minus = of(self._probe())
                    return (plus - minus) / (2 * perturbation.epsilon)
            return (plus - start) / perturbation.epsilon

    def _perturbed(self, v: Vector, radius: float) -> perturbed:
        norm = self.length(v) if self.sharded else None
        return perturbed({name: self.parameters[name] for name in v}, v, radius, norm=norm)

    @property
    def sharded(self) -> bool:
        """See :attr:`ProblemBase.sharded`."""
        return self.function.sharded

    def length(self, direction: AnyDirection) -> Tensor:
        """See :meth:`ProblemBase.length`."""
        return self.function.norm(of_model(direction))

    def _impute_first(self) -> None:
        """Impute the labels at theta before a central difference, which makes no pass at theta."""
        if self.how == "finite_difference":
            _ = self.labels

    def _probe(self) -> Tensor:
        """Unlabeled logits ``[N, C]`` at the parameters, which are moved, in full precision."""
        views = {name: value.detach() for name, value in self.parameters.items()}  # the model may set their .data
        logits = full_precision(self.function.logits(self.unlabeled, views))
        self.given.check(logits)
        return logits

    def _see(self, logits: Tensor) -> Tensor:
        """Keep the unlabeled logits ``[N, C]`` of a pass at theta; returns them in full precision."""
        logits = full_precision(logits)
        self.given.check(logits)
        if self.seen.logits is None:
            self.seen.logits = logits.detach()
        return logits

    def _terms(self, inner: InnerLoss) -> list[Term]:
        return [self.term(part, loss, inner.reduction, factor) for part, loss, factor in inner.terms()]

    def term(self, part: Part, loss: str, reduction: Reduction, factor: float = 1.0) -> Term:
        """A reduced loss times ``factor``, as a summand of an objective."""
        unlabeled = part == "unlabeled"
        inputs, given, names = (self.unlabeled, None, ("", "")) if unlabeled else self._labels_of(part)
        scales: list[float | Tensor] = []  # processes add up their counts once for each term, not for each product

        def weighted(of: Callable[[Tensor, Tensor], Tensor], logits: Tensor) -> Tensor:
            """Rows made of the logits and the targets, times their weights in the reduced loss."""
            logits = self._see(logits) if unlabeled else full_precision(logits)
            if given is None:
                target = Kept(probabilities(self.labels, logits, loss), self.inner_weights, len(logits))
            else:
                target = read(given, logits, loss, *names)
            if not scales:
                scales.append(factor * self.mean_scale(target.number) if reduction == "mean" else factor)
            rows, each, weights = of(logits, target.targets), scales[0], target.weights
            return rows * each if weights is None else rows * (each * weights).view(-1, *[1] * (rows.dim() - 1))

        def value(logits: Tensor) -> Tensor:
            return weighted(lambda f, y: losses.loss_per_example(f, y, loss), logits).sum()

        def curvature(logits: Tensor, tangent: Tensor) -> Tensor:
            return weighted(lambda f, y: losses.gauss_newton(f, y, full_precision(tangent), loss), logits)

        return Term(inputs, value, curvature)

    def _labels_of(self, part: Part) -> tuple[Inputs, Tensor, tuple[str, str]]:
        """Hold-out examples, or the labeled ones of the inner loss, their targets, and the names of these arguments."""
        if part == "labeled" and self.labeled is not None and self.labeled_targets is not None:
            return self.labeled, self.labeled_targets, ("labeled_targets", "labeled")
        if self.holdout is None or self.targets is None:
            raise ValueError("holdout and targets are needed by this direction, got None")
        return self.holdout, self.targets, ("targets", "holdout")

    def _joined(self, gradient: Vector) -> Vector:
        if self.process_group is None:
            return gradient
        return self.function.joined(gradient, self.process_group)


def _within(name: str, layer: str) -> bool:
    return name == layer or name.startswith(f"{layer}.")
