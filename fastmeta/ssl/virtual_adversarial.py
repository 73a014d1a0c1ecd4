"""Virtual adversarial training (Miyato et al., 2018)."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmeta import checks
from fastmeta.problem.random_state import RandomState
from fastmeta.ssl.base import Algorithm, Refiner, StepLoss, TrainingBatch, features_for, frozen_statistics, refine
from fastmeta.ssl.labels import as_they_are, conditional_entropy, harden, kl_divergence


def virtual_adversarial_direction(
    model: nn.Module,
    inputs: Tensor,
    logits: Tensor,
    *,
    xi: float = 1e-2,
    power_iterations: int = 1,
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
) -> Tensor:
    r"""The direction in which a small step changes each prediction most, ``[N, ...]`` with rows of length 1.

    Power iteration on the Hessian H of the divergence, from a random start:

    .. math:: d \leftarrow \overline{\nabla_r \mathrm{KL}(p(x) \,\|\, p(x + r))\big|_{r = \xi d}},
        \qquad \nabla_r = \xi H d + O(\xi^2)

    Arguments, errors and what is left untouched: see :func:`virtual_adversarial_loss`. An example whose gradient is
    exactly 0 keeps its last direction.
    """
    _check(inputs, logits, xi, power_iterations)
    inputs = inputs.detach()
    if start is None:
        source = inputs.device if generator is None else generator.device
        start = torch.randn(inputs.shape, dtype=inputs.dtype, device=source, generator=generator)
    checks.shaped(start, "start", "[N, ...]", inputs.shape)
    direction = _unit(start.to(inputs), otherwise=torch.zeros_like(inputs))
    random, device = RandomState([inputs.device]), inputs.device.type
    rounded = torch.is_autocast_enabled(device)
    target = logits.detach().softmax(dim=1)
    for iteration in range(power_iterations):
        offset = (xi * direction).requires_grad_()
        with torch.enable_grad(), frozen_statistics(model), torch.autocast(device, enabled=False):
            moved = model(inputs + offset)
            if iteration == 0 and (rounded or not random.is_current()):
                # The difference of two dropout masks, or autocast's rounding, would drown that of the inputs.
                random.restore()
                with torch.no_grad():
                    target = model(inputs).softmax(dim=1)
            (gradient,) = torch.autograd.grad(kl_divergence(moved, target), offset)
        random.restore()
        direction = _unit(gradient, otherwise=direction)
    return direction


def virtual_adversarial_loss(
    model: nn.Module,
    inputs: Tensor,
    logits: Tensor,
    *,
    radius: float,
    xi: float = 1e-2,
    power_iterations: int = 1,
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
) -> Tensor:
    r"""How far the worst small change of the inputs moves the predictions: the paper's local smoothness.

    .. math:: \frac{1}{N} \sum_i \mathrm{KL}\big(p(x_i) \,\|\, p(x_i + r_i)\big), \qquad
        r_i = \mathrm{radius} \cdot d_i

    with ``d`` from :func:`virtual_adversarial_direction` and ``p(x)`` and ``r`` as constants. It takes
    ``power_iterations`` forward and backward passes to the inputs, and one forward pass on the graph.

    The model runs in the mode it is in. Its parameters' ``.grad`` and batch normalization's running statistics are left
    alone. With batch statistics, ``logits`` must come from a forward of just these inputs; those of a larger batch
    differ by more than ``xi`` does. With dropout all passes made here share one mask, and where a model draws any, the
    search runs one more forward for ``p(x)`` under that mask; ``p(x)`` of the loss is that of ``logits`` as they are.
    Under autocast the search runs in the parameters' dtype, and one more forward for ``p(x)``, too.

    The published ``xi = 1e-6`` is below what float32 resolves: the change of the logits drowns in their rounding.
    Cosine of the direction to its limit in float64, one iteration, mean over images and three nets:

    ===========================================  =====  ====  ====  =====  =====  ====  ====
    xi                                           1e-6   1e-5  1e-4  1e-3   1e-2   0.1   1
    ===========================================  =====  ====  ====  =====  =====  ====  ====
    float32, ConvNet, digits, untrained          0.39   0.96  1.00  1.000  0.995  0.95  0.60
    float32, ConvNet, digits, trained            0.02   0.21  0.68  0.986  0.997  0.92  0.46
    float32, WRN-28-2, noise, untrained          -0.02  0.36  0.95  0.998  0.996  0.96  0.72
    float32, ConvLarge, noise, untrained         0.04   0.35  0.94  0.999  0.998  0.97  0.75
    float64, ConvNet, digits, trained            1.00   1.00  1.00  1.000  0.997  0.92  0.46
    bfloat16, ConvNet, digits, trained           -0.15  -0.1  -0.1  -0.08  0.43   0.91  0.46
    bfloat16, WRN-28-2, untrained                0.07   0.07  0.17  0.06   0.17   0.23  0.62
    ===========================================  =====  ====  ====  =====  =====  ====  ====

    Hence the default, and no autocast in the search.

    Args:
        model: from ``[N, ...]`` to logits ``[N, C]``.
        inputs: x ``[N, ...]``.
        logits: of ``inputs`` ``[N, C]``; no gradient flows through them.
        radius: Euclidean length of each example's perturbation, in the inputs' units.
        xi: length of the search's step, in the same units.
        power_iterations: 0 perturbs at random.
        generator: draws the start; None: the default one of the inputs' device.
        start: the start itself, ``[N, ...]`` of any length; None: it is drawn.

    Raises:
        ValueError: a shape or number does not fit.
        TypeError: a tensor is not floating.

    >>> model = nn.Linear(4, 3)
    >>> x = torch.randn(5, 4)
    >>> loss = virtual_adversarial_loss(model, x, model(x), radius=0.5)
    >>> loss.requires_grad, bool(loss > 0)
    (True, True)
    """
    checks.number(radius, "radius", low=0.0)
    direction = virtual_adversarial_direction(
        model, inputs, logits, xi=xi, power_iterations=power_iterations, generator=generator, start=start
    )
    with frozen_statistics(model):
        moved = model(inputs + radius * direction)
    return kl_divergence(moved, logits.detach().softmax(dim=1))


@dataclass(frozen=True)
class VirtualAdversarial(Algorithm):
    """Predictions are to stay the same under the worst small change of the image.

    ``CE(f(x_l), y_l) + weight * VAT + entropy_weight * mean_i H(softmax f(x_i))`` with VAT the
    :func:`virtual_adversarial_loss`; it and the entropy are means over labeled and weakly augmented unlabeled images
    together, as in the paper. Imputed labels are the predictions on the latter. A method refines these, and then
    ``mean_i w_i CE(f(weak_i), labels_i)`` is added (Label Gradient Alignment + VAT: its table's labels). To a method
    that weighs examples they are given one-hot: a prediction as its own soft label has no gradient to weigh. To batch
    normalization labeled and unlabeled images are one batch; perturbed ones leave running statistics alone.

    Args:
        radius: of the perturbation, Euclidean, in the images' units; published: 6 (SVHN 1) after whitening.
        weight: of VAT.
        entropy_weight: of the entropy; 0 for VAT alone.
        xi: see :func:`virtual_adversarial_loss`.
        power_iterations: see :func:`virtual_adversarial_loss`.
    """

    radius: float = 6.0
    weight: float = 0.3
    entropy_weight: float = 0.06
    xi: float = 1e-2
    power_iterations: int = 1

    imputes: ClassVar[bool] = True
    second_view: ClassVar[Literal["weak", "strong"] | None] = None

    def loss(
        self,
        model: nn.Module,
        batch: TrainingBatch,
        *,
        teacher: nn.Module,
        progress: float,
        refiner: Refiner | None = None,
        memory: nn.Module | None = None,
    ) -> StepLoss:
        """See :class:`fastmeta.ssl.Algorithm`. ``StepLoss.unlabeled`` is the sum of its parts, each with its weight."""
        images = torch.cat([batch.labeled, batch.weak])
        with features_for(refiner, model) as tape:
            logits = model(images)
        labeled_logits, weak_logits = logits.split([len(batch.labeled), len(batch.weak)])
        used = refine(
            refiner,
            tape,
            model,
            batch,
            imputed=weak_logits.softmax(dim=1),
            views={"imputed": weak_logits, "learned": weak_logits},
            inputs={"imputed": batch.weak, "learned": batch.weak},
            labeled_logits=labeled_logits,
            finish=partial(harden, threshold=0.0) if refiner is not None and refiner.hard else as_they_are,
        )
        adversarial = virtual_adversarial_loss(
            model,
            images,
            logits,
            radius=self.radius,
            xi=self.xi,
            power_iterations=self.power_iterations,
            start=_start(images, batch),
        )
        unlabeled = batch.joined_share * (self.weight * adversarial + self.entropy_weight * conditional_entropy(logits))
        if refiner is not None:
            per_example = functional.cross_entropy(weak_logits, used.labels, reduction="none")
            unlabeled = unlabeled + batch.unlabeled_share * (used.weights * per_example).mean()
        labeled = batch.labeled_share * functional.cross_entropy(labeled_logits, batch.targets)
        total = labeled + unlabeled + used.loss
        return StepLoss(total, labeled.detach(), unlabeled.detach(), weak_logits.detach().softmax(dim=1), used)


def _start(images: Tensor, batch: TrainingBatch) -> Tensor | None:
    """Each image's own draw, whatever batch and process it is in; None for a batch that has no keys."""
    random = batch.random("adversarial direction")
    columns = images[0].numel()
    return None if random is None else torch.cat([part.normal(columns) for part in random]).view_as(images)


def _unit(rows: Tensor, *, otherwise: Tensor) -> Tensor:
    """Each example of ``rows`` at Euclidean length 1; one that is 0 is taken from ``otherwise``."""
    flat = rows.flatten(1)
    largest = flat.abs().amax(dim=1, keepdim=True)
    scaled = flat / largest  # squares of small gradients underflow
    unit = scaled / torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    return torch.where(largest > 0, unit, otherwise.flatten(1)).view_as(rows)


def _check(inputs: Tensor, logits: Tensor, xi: float, power_iterations: int) -> None:
    checks.floating(inputs, "inputs")
    if inputs.dim() < 2:
        raise ValueError(f"inputs must be [N, ...], got {inputs.dim()}-D {list(inputs.shape)}")
    checks.matrix(logits, "logits", "[N, C]")
    checks.shaped(logits, "logits", "[N, C]", (len(inputs), logits.shape[1]))
    if not checks.number(xi, "xi") > 0:
        raise ValueError(f"xi must be above 0, got {xi}")
    if isinstance(power_iterations, bool) or not isinstance(power_iterations, int):
        raise TypeError(f"power_iterations must be an integer, got {type(power_iterations).__name__}")
    if power_iterations < 0:
        raise ValueError(f"power_iterations must be at least 0, got {power_iterations}")
