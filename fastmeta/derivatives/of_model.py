"""How the predictions of a whole model move along a direction of its parameters, in four ways with one result."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastmeta import checks, losses, ops
from fastmeta.derivatives.derivative import HOWS, How
from fastmeta.model_function import Inputs, ModelFunction, Vector
from fastmeta.model_problem import full_precision
from fastmeta.ops.perturbed import perturbed

RowFunction = Callable[[Tensor], Tensor]  # logits [N, C] to [N, C] or [N]


def label_gradient(
    model: nn.Module,
    inputs: Inputs,
    direction: Vector,
    *,
    loss: str = "cross_entropy",
    scale: float = 1.0,
    how: How = "jvp",
    radius: float = 0.01,
) -> Tensor:
    """``scale T_i(v)`` where the whole model moves, ``T = D_v(-dl/dy)``. ``[N, C]``."""
    checks.loss_code(loss)
    function, direction, parts = _function(model, direction, how, radius)
    if parts is not None:
        outputs = function.outputs(inputs)
        return ops.label_gradient(outputs.features, full_precision(outputs.logits), *parts, loss=loss, scale=scale)
    return scale * label_tangent(function, inputs, direction, loss=loss, how=how, radius=radius)


def example_weight_gradient(
    model: nn.Module,
    inputs: Inputs,
    targets: Tensor,
    direction: Vector,
    *,
    loss: str = "cross_entropy",
    scale: float = 1.0,
    how: How = "jvp",
    radius: float = 0.01,
) -> Tensor:
    """``-scale D_v l_i`` where the whole model moves. ``[N]``."""
    checks.loss_code(loss)
    function, direction, parts = _function(model, direction, how, radius)
    if parts is not None:
        outputs = function.outputs(inputs)
        return -scale * ops.per_example_dot(
            outputs.features, full_precision(outputs.logits), targets, *parts, loss=loss
        )
    return -scale * loss_tangent(function, inputs, lambda: targets, direction, loss=loss, how=how, radius=radius)


def label_tangent(
    function: ModelFunction,
    inputs: Inputs,
    direction: Vector,
    parameters: Vector | None = None,
    *,
    loss: str,
    how: How,
    radius: float,
    labels: Callable[[], Tensor] | None = None,
    see: RowFunction = full_precision,
    keep: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """``T_i(v)``. ``[N, C]``.

    Args:
        function: the model.
        inputs: of N examples.
        direction: v by name.
        parameters: theta; None: the model's own.
        loss: also ``mse_tanh``, which needs the labels.
        how: which way, not ``last_layer``.
        radius: of a difference.
        labels: asked for the labels ``[N, C]`` where the loss needs them, after ``see``.
        see: is shown the logits ``[N, C]`` of a pass at theta, if there is one, and returns them in full precision.
        keep: is given those of a plain pass at theta or one of forward mode, then made at the model's own parameters
            and on their graph; None: no graph is recorded.
    """
    needs_labels = loss == "mse_tanh"
    if how == "double_backward":
        theta = leaves(function, parameters)
        with torch.enable_grad():
            logits = see(function.logits(inputs, theta, twice=True))
            targets = labels() if labels is not None else losses.prediction(logits, loss)
            targets = targets.detach().clone().requires_grad_()
            total = losses.loss_per_example(logits, targets, loss).sum()
        return -mixed(function, total, theta, direction, [targets])[0]
    if how == "jvp":
        logits, tangent = function.jvp(inputs, direction, parameters, on_graph=keep is not None)
        if keep is not None:
            keep(logits)
        logits = see(logits.detach())
        given = labels() if labels is not None and needs_labels else None
        return losses.label_tangent(logits, full_precision(tangent), loss, given)
    known = labels() if labels is not None and needs_labels else None

    def pull(logits: Tensor) -> Tensor:
        return losses.label_pull(full_precision(logits), loss, known)

    def at_theta(logits: Tensor) -> Tensor:
        if keep is not None:
            keep(logits)
        return see(logits.detach())

    return difference(function, inputs, direction, parameters, pull, how, radius, at_theta, keep is not None)


def loss_tangent(
    function: ModelFunction,
    inputs: Inputs,
    targets: Callable[[], Tensor],
    direction: Vector,
    parameters: Vector | None = None,
    *,
    loss: str,
    how: How,
    radius: float,
    see: RowFunction = full_precision,
) -> Tensor:
    """``D_v l_i``. ``[N]``; see :func:`label_tangent`."""

    def probabilities(logits: Tensor) -> Tensor:
        return losses.as_probabilities(targets(), logits.shape[1], logits.dtype).to(logits.dtype)

    if how == "double_backward":
        theta = leaves(function, parameters)
        with torch.enable_grad():
            logits = see(function.logits(inputs, theta, twice=True))
            weights = logits.new_ones(len(logits)).requires_grad_()
            total = (weights * losses.loss_per_example(logits, probabilities(logits), loss)).sum()
        return mixed(function, total, theta, direction, [weights])[0]
    if how == "jvp":
        logits, tangent = function.jvp(inputs, direction, parameters)
        logits = see(logits)
        return (losses.residual(logits, probabilities(logits), loss) * full_precision(tangent)).sum(-1)

    if how == "finite_difference":
        targets()  # imputed at theta, which the passes below are not

    def loss_of(logits: Tensor) -> Tensor:
        logits = full_precision(logits)
        return losses.loss_per_example(logits, probabilities(logits), loss)

    return difference(function, inputs, direction, parameters, loss_of, how, radius, see)


def leaves(function: ModelFunction, parameters: Vector | None) -> Vector:
    """The parameters, theta or else the model's own, as leaves that require grad."""
    theta = function.parameters if parameters is None else parameters
    return {name: value.detach().requires_grad_() for name, value in theta.items()}


def mixed(
    function: ModelFunction, total: Tensor, theta: Vector, direction: Vector, of: list[Tensor]
) -> tuple[Tensor, ...]:
    """``d/d of <grad_theta total, v>``: the definition, by differentiating twice."""
    moving = {name: theta[name] for name in direction}
    gradient = function.differentiated([total], theta, moving, create_graph=True)
    by = {str(place): tensor for place, tensor in enumerate(of)}
    along = list(direction.values())
    return tuple(function.differentiated(list(gradient.values()), theta, by, along).values())


def difference(
    function: ModelFunction,
    inputs: Inputs,
    direction: Vector,
    parameters: Vector | None,
    of: RowFunction,
    how: How,
    radius: float,
    see: RowFunction,
    on_graph: bool = False,
) -> Tensor:
    """``(of(theta + epsilon v) - of(theta - epsilon v)) / 2 epsilon``, or one-sided from theta, in place."""
    theta = function.parameters if parameters is None else parameters
    moving = {name: theta[name] for name in direction}
    with torch.no_grad():
        other = None
        if how == "forward_difference":
            other = of(see(function.logits(inputs, None if on_graph else theta, on_graph=on_graph)))
        with perturbed(moving, direction, radius) as perturbation:
            plus = of(function.logits(inputs, theta))
            if other is None:
                perturbation.flip()
                minus = of(function.logits(inputs, theta))
                return (plus - minus) / (2 * perturbation.epsilon)
        return (plus - other) / perturbation.epsilon


def _function(
    model: nn.Module, direction: Vector, how: How, radius: float
) -> tuple[ModelFunction, Vector, tuple[Tensor, Tensor | None] | None]:
    """The model, the direction by the names of its parameters, and for ``last_layer`` that of its last layer."""
    if how not in HOWS:
        raise ValueError(f"how must be one of {', '.join(HOWS)}, got {how!r}")
    checks.number(radius, "radius", low=0.0)
    function = ModelFunction(model)
    direction = function.check(direction)
    return function, direction, function.last_layer_direction(direction) if how == "last_layer" else None
