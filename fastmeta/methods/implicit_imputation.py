"""Implicit imputation: Learning to Impute with the inner problem solved to the end."""

from typing import Literal

from fastmeta import checks
from fastmeta.derivatives import How, LabelGradient
from fastmeta.directions import DirectionRule, HoldoutGradient, InverseHessian, Solver, UnitLength
from fastmeta.methods.base import Method
from fastmeta.ops.process_group import Group
from fastmeta.ops.process_group import check as check_group
from fastmeta.problem import Curvature
from fastmeta.state import PartNumber
from fastmeta.updates import LabelLogitStep, PullBack, Update


class ImplicitImputation(Method):
    r"""Labels such that training on them, to the end, lowers the hold-out loss. Not published.

    With ``theta*(z) = argmin C^T + C^U(z)`` and H its damped Hessian, by the implicit function theorem:

    .. math:: \frac{\partial C^H(\theta^*)}{\partial z_i} = \frac{1}{B}\, T_i(v), \qquad v = H^{-1} \nabla C^H

    Learning to Impute looks one inner step ahead, ``v = rate grad C^H(theta*)``, which grows only along what one step
    reaches; the direction here is that of Not All Unlabeled Data Are Equal, Eq. (6), which is the limit of many steps.
    V1 steps on the logits of the labels; V2 leaves them and returns a surrogate of the pull-back through the imputer.

    Args:
        variant: ``V1`` or ``V2``.
        how: ``last_layer``: in closed form, where only the last layer is trained to the end; else the whole model, and
            how its derivative is taken, see :func:`fastmeta.label_gradient`. :meth:`refine` then needs the model.
        radius: length of the perturbation of a difference.
        mode: of the model in the method's own passes, ``train`` or ``eval``; None: as it stands.
        inner_loss: of the unlabeled examples (C^U) and the labeled ones (C^T), as the loop trains them.
        outer_loss: of the hold-out examples.
        damping: added to the Hessian's diagonal, > 0; weight decay enters here.
        solver: see :class:`fastmeta.directions.InverseHessian`.
        tol: relative residual at which iterative solvers stop.
        max_iter: and their limit.
        layers: names of the modules or parameters that are trained to the end; None: all. For the whole model alone.
        curvature: of the whole model, ``gauss_newton`` or ``hessian``, which needs a damping above its most negative
            eigenvalue.
        unit_length: scale ``H^{-1} grad C^H`` to length 1.
        label_step: V1: size of the step.
        weight: V2: of the surrogate.
        process_group: processes that the batch is spread over, whose gradients are summed.

    Raises:
        ValueError: an option is not one of those named, or a number is out of its range.

    >>> import torch, fastmeta
    >>> model = torch.nn.Linear(4, 3)
    >>> with fastmeta.capture_features(model) as tape:
    ...     logits_l, logits_u = model(torch.ones(5, 4)), model(torch.ones(6, 4))
    >>> targets = torch.zeros(5, dtype=torch.int64)
    >>> refined = ImplicitImputation("V1", label_step=10.0).refine(
    ...     unlabeled=tape.outputs(logits_u), holdout=tape.outputs(logits_l), targets=targets)
    >>> bool((refined.labels[:, 0] > logits_u.softmax(-1)[:, 0]).all())
    True
    """

    weight = PartNumber("update", "weight")
    label_step = PartNumber("update", "step")
    damping = PartNumber("direction", "damping")

    def __init__(
        self,
        variant: Literal["V1", "V2"] = "V2",
        *,
        how: How = "last_layer",
        radius: float = 0.01,
        mode: Literal["train", "eval"] | None = None,
        inner_loss: str = "cross_entropy",
        outer_loss: str = "cross_entropy",
        damping: float = 0.1,
        solver: Solver = "auto",
        tol: float = 1e-4,
        max_iter: int = 100,
        layers: tuple[str, ...] | None = None,
        curvature: Curvature = "gauss_newton",
        unit_length: bool = True,
        label_step: float = 1.0,
        weight: float = 0.5,
        process_group: Group = None,
    ) -> None:
        check_group(process_group)
        checks.choice(variant, "variant", "V1", "V2")
        if mode is not None:
            checks.choice(mode, "mode", "train", "eval")
        checks.loss_code(inner_loss, "inner_loss")
        if variant == "V1":
            checks.choice(inner_loss, "inner_loss", "cross_entropy", "mse_probs")
        checks.loss_code(outer_loss, "outer_loss")
        if how == "last_layer" and layers is not None:
            raise ValueError(f"layers must be None for how='last_layer', got {layers}")
        direction: DirectionRule = InverseHessian(
            HoldoutGradient(loss=outer_loss),
            damping=checks.number(damping, "damping", low=0.0),
            solver=solver,
            tol=tol,
            max_iter=max_iter,
            loss=inner_loss,
            layers=layers,
            curvature=curvature,
        )
        if unit_length:
            direction = UnitLength(direction)
        self.mode = mode
        self.inner_loss = inner_loss
        update: Update
        if variant == "V1":
            update = LabelLogitStep(step=checks.number(label_step, "label_step"))
        else:
            update = PullBack(weight=weight, process_group=process_group)
        gradient = LabelGradient(inner_loss, how=how, radius=radius)
        super().__init__(direction, gradient, update, process_group=process_group)
