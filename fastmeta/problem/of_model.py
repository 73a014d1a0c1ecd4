"""Derivatives of a model's predictions and losses along a direction of its parameters."""

from torch import Tensor, nn

from fastmeta import checks, losses, ops
from fastmeta.problem.base import How, check_how, full_precision
from fastmeta.problem.direction import Vector
from fastmeta.problem.evaluation import eager
from fastmeta.problem.model_function import Inputs, ModelFunction
from fastmeta.problem.targets import kept, probabilities
from fastmeta.problem.whole_model import WholeModelProblem


@eager
def label_gradient(
    model: nn.Module,
    inputs: Inputs,
    direction: Vector,
    *,
    loss: str = "cross_entropy",
    scale: float = 1.0,
    how: How = "jvp",
    radius: float = 0.01,
    targets: Tensor | None = None,
) -> Tensor:
    r"""Derivative of ``-dl/dy`` as the whole model moves along a direction. ``[N, C]``.

    .. math:: \text{scale}\; T_i(v), \qquad
        T(v) = D_v\Bigl(-\frac{\partial l}{\partial y}\Bigr) =
        \frac{d}{dt} \Bigl(-\frac{\partial l}{\partial y}\Bigr)(f(x; \theta + t v)) \Big|_{t=0}

    ``D_v log p`` for cross-entropy, ``D_v f`` for binary cross-entropy, ``2 D_v f`` for mse, ``2 D_v p`` for mse_probs;
    the table of :mod:`fastmeta.losses` has all of them.
    With ``v = grad C^H(theta*)`` and ``scale = eta / B`` it is the gradient of the hold-out loss after an inner step
    with respect to the labels of that step: Learning to Impute, Eq. (V1); Meta-Gradient, Eq. (13).

    All ways but the differences give one result, up to rounding:

    - ``jvp``: forward mode, in one pass that holds no graph. Where every weight moves it is three of a forward's
      convolutions and matrix products (primal, and two for the tangent).
    - ``double_backward``: the definition, for a model without forward mode; several times the time, and a graph.
    - ``finite_difference``: ``(g(theta + eps v) - g(theta - eps v)) / 2 eps`` with ``eps = radius / ||v||``, two
      forward passes, in place, as Meta-Gradient, Eq. (16), takes it. At the published radius of 0.01 it is a probe of
      finite length, no derivative; shorter ones are limited by rounding, in bfloat16 soon. What a model computes under
      ``torch.no_grad`` moves too; the other ways take it as a constant.
    - ``forward_difference``: ``(g(theta + eps v) - g(theta)) / eps``.
    - ``last_layer``: in closed form, where only the last linear layer moves.

    The model runs in its mode as it stands: in train mode BatchNorm takes the statistics of this batch, so that
    examples act on each other, and all of that is in the result. Every pass draws the dropout masks that a call of the
    model would draw next, except in fused attention kernels on a GPU, and gets a copy of the inputs. Parameters,
    buffers, other attributes of its modules, ``.grad``, mode and random state (torch's, Python's, NumPy's, that of
    generators which a module holds) are left as they were, after an exception too; forward hooks run in every pass.
    Under autocast the model's part is in its precision. Inside torch.compile it breaks the graph and runs uncompiled,
    as do compiled models; TorchScript runs unoptimized. Checkpointed blocks stay checkpointed, also reentrant ones.

    Args:
        model: gives logits ``[N, C]``, or ``[B, T, C]`` of tokens, which are N = B T rows; by themselves, as ``logits``
            of an object or dict, or as the only such tensor of a tuple. May be wrapped for data parallelism or
            compiled.
        inputs: of N examples, N the rows of the logits: a tuple of positional arguments, a mapping of keyword
            arguments, or the one argument: a tensor, a list, a named tuple, a ``PackedSequence``, any object.
        direction: v, tensors by parameter name and like the parameters; one that is left out or None does not move.
        loss: one of :data:`fastmeta.losses.LOSSES`.
        scale: factor of the result.
        how: see above.
        radius: length of the differences' perturbation, > 0.
        targets: y, int64 classes ``[N]`` or ``[N, C]``, where the label tangent of the loss reads them; else they are
            not looked at.

    Returns:
        In float32, or float64 if the logits are, and detached.

    Raises:
        TypeError: the direction is no dict, a dtype does not fit, or the model gives no logits.
        ValueError: a name, shape or device in the direction does not fit, an option is unknown, the loss needs targets,
            or the logits are not 2-D; or the model has parameters outside of ``named_parameters``, or changes them (in
            place by their ``.data``: ``jvp`` and ``double_backward`` see it, differences do not).
        NotImplementedError: ``jvp`` meets an operator without a forward-mode derivative; or the model has a
            ``torch.autograd.Function`` that reads parameters which are not its arguments (a checkpoint of another
            library), whose derivative ``jvp`` and ``double_backward`` would take for 0.

    >>> import torch
    >>> model = torch.nn.Linear(2, 2, bias=False)
    >>> x, v = torch.tensor([[1.0, 2.0]]), {"weight": torch.tensor([[1.0, 0.0], [0.0, 1.0]])}
    >>> label_gradient(model, x, v, loss="mse", scale=0.5)
    tensor([[1., 2.]])
    """
    checks.loss_code(loss)
    read = losses.label_tangent_targets(targets, loss)
    check_how(how, radius)
    function = ModelFunction(model)
    direction = function.check(direction)
    if how == "last_layer":
        features, logits, weight, bias = _last_layer(function, inputs, direction)
        y = None if read is None else probabilities(read, logits, loss)
        return ops.label_gradient(features, logits, weight, bias, loss=loss, scale=scale, targets=y)
    labels = read if read is not None else lambda logits: losses.prediction(logits, loss)
    problem = WholeModelProblem(function, inputs, labels, how=how, radius=radius)
    return problem.label_tangent(direction, loss=loss, rate=scale)


@eager
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
    r"""How every example's loss falls as the whole model moves along a direction. ``[N]``.

    .. math:: -\text{scale}\; D_v\, l_i = -\text{scale}\; \langle \nabla_\theta\, l(f(x_i; \theta), y_i), v \rangle

    With ``v = H^{-1} grad L_val`` and scale 1 it is the influence of an example's weight on the validation loss: Not
    All Unlabeled Data Are Equal, Eq. (6). No gradient of a single example is taken. Where examples act on each other
    (BatchNorm in train mode) ``l_i`` depends on the batch, and so does this.

    Args:
        model: see :func:`label_gradient`, also for everything that is not said here.
        inputs: of N examples.
        targets: y, int64 classes ``[N]`` or probabilities ``[N, C]``; of tokens also ``[B, T]`` or ``[B, T, C]``. A
            class of -100 is left out: its row is 0.
        direction: v, tensors by parameter name.
        loss: one of :data:`fastmeta.losses.LOSSES`.
        scale: factor of the result.
        how: ``jvp``, ``double_backward``, ``finite_difference``, ``forward_difference`` or ``last_layer``.
        radius: length of the differences' perturbation, > 0.

    Returns:
        In float32, or float64 if the logits are, and detached.

    Raises:
        TypeError: see :func:`label_gradient`; or the dtype of the targets does not fit.
        ValueError: see :func:`label_gradient`; or the shape or a class of the targets does not fit.
        NotImplementedError: ``jvp`` meets an operator without a forward-mode derivative.

    >>> import torch
    >>> model = torch.nn.Linear(2, 2, bias=False)
    >>> x, v = torch.tensor([[1.0, 2.0]]), {"weight": torch.tensor([[1.0, 0.0], [0.0, 1.0]])}
    >>> _ = torch.nn.init.ones_(model.weight)  # f = (3, 3), D_v f = (1, 2)
    >>> example_weight_gradient(model, x, torch.zeros(1, 2), v, loss="mse")
    tensor([-18.])
    """
    checks.loss_code(loss)
    check_how(how, radius)
    function = ModelFunction(model)
    direction = function.check(direction)
    if how == "last_layer":
        features, logits, weight, bias = _last_layer(function, inputs, direction)
        y = probabilities(targets, logits, loss)
        gradient = -scale * ops.per_example_dot(features, logits, y, weight, bias, loss=loss)
    else:
        problem = WholeModelProblem(function, inputs, targets, how=how, radius=radius)
        gradient = -scale * problem.loss_tangent(direction, loss=loss)
    weights = kept(targets, gradient.dtype).weights
    return gradient if weights is None else gradient * weights.flatten()


def _last_layer(
    function: ModelFunction, inputs: Inputs, direction: Vector
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Features ``[N, D]`` and logits ``[N, C]``, and the direction's weight and bias, all in full precision."""
    weight, bias = function.last_layer_direction(direction)
    outputs = function.outputs(inputs)
    features, logits, weight = map(full_precision, (outputs.features, outputs.logits, weight))
    return features, logits, weight, None if bias is None else full_precision(bias)
