"""Not All Unlabeled Data Are Equal: Learning to Weight Data in Semi-Supervised Learning (Ren, Yeh, Schwing)."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastmeta import checks, losses
from fastmeta.capture import Outputs
from fastmeta.derivatives import ExampleWeightGradient, How
from fastmeta.directions import DirectionRule, HoldoutGradient, InLayers, InverseHessian, Solver
from fastmeta.methods.base import Method
from fastmeta.methods.batch import Batch, as_outputs, check_rows
from fastmeta.ops.masked_adam_table import TableOptimizer
from fastmeta.ops.process_group import Group
from fastmeta.problem import Curvature, Reduction
from fastmeta.problem.model_function import Inputs
from fastmeta.state import PartNumber
from fastmeta.updates import Refined, SharedWeight, WeightTable


@dataclass(frozen=True)
class ExampleWeightsPreset:
    """Arguments of :class:`fastmeta.ExampleWeights`."""

    damping: float
    bias: bool
    masked: bool
    read: Literal["before", "after"]
    duplicates: Literal["sum", "last"]
    reduction: Reduction
    inverse_hessian: Solver = "cholesky"
    interval: int = 100
    lr: float = 0.01
    low: float = 0.0
    high: float = 2.0


# N: the paper's text and Table 3, and the default of the code's flag, say 100; the README of the code gives 512 among
# "the hyper-parameters used in the paper". The clip to [0, 2] and the initial weight of 1 are the code's alone.
PRESETS = {
    # Eq. (1) and (2): sums over the labeled, the unlabeled and the validation examples, of which H in Eq. (6) is the
    # second derivative; the weight decay, 5e-4, is added to it; the unlabeled loss of an example includes its mask;
    # "the last layer"; an example that was drawn twice has the gradient of both; Algorithm 1 trains on the weights
    # after their update.
    "paper": ExampleWeightsPreset(
        damping=5e-4, bias=True, masked=True, read="after", duplicates="sum", reduction="sum"
    ),
    # main.py: means; weight decay enters the Hessian with coefficient 1, the kernel alone, no mask in an example's
    # gradient; NumPy's assignment by index keeps the last of an example drawn twice; the step uses the weights read
    # before the update.
    "official_code": ExampleWeightsPreset(
        damping=1.0, bias=False, masked=False, read="before", duplicates="last", reduction="mean"
    ),
}


def preset(name: str) -> ExampleWeightsPreset:
    """Settings of the ``paper`` or of the ``official_code``.

    >>> preset("paper").damping, preset("official_code").damping
    (0.0005, 1.0)
    """
    return checks.preset(PRESETS, name, "ExampleWeights")


@dataclass(frozen=True, eq=False)
class TwoViews(Batch):
    """A batch whose labels are imputed from one view, and whose unlabeled loss is taken on another."""

    strong: Outputs | Inputs | None = None
    pseudo_labels: Tensor | None = None
    harden: bool = True  # make imputed labels one-hot

    def check(self, how: str, needs_index: bool, learns: bool, method: str) -> None:
        """See :meth:`Batch.check`."""
        if self.pseudo_labels is not None and not isinstance(self.pseudo_labels, Tensor):
            raise TypeError(f"pseudo_labels must be a tensor, got {type(self.pseudo_labels).__name__}")
        super().check(how, needs_index, learns, method)
        if self.strong is None:
            return
        if self.model is not None:
            if isinstance(self.strong, Outputs):
                raise TypeError("strong must be inputs of the model where model is given, got Outputs")
            return
        unlabeled = as_outputs(self.unlabeled, "unlabeled")
        strong = check_rows(self.strong, "strong", unlabeled)
        if len(strong.logits) != len(unlabeled.logits):
            raise ValueError(f"strong must have N = {len(unlabeled.logits)} like unlabeled, got {len(strong.logits)}")

    @property
    def per_example(self) -> dict[str, Tensor]:
        """See :attr:`Batch.per_example`."""
        more = {} if self.pseudo_labels is None else {"pseudo_labels": self.pseudo_labels}
        return {**super().per_example, **more}

    @property
    def view(self) -> str:
        """See :attr:`Batch.view`."""
        return "unlabeled" if self.strong is None else "strong"

    def labels_are_predictions(self, loss: str) -> bool:
        """Whether the unlabeled loss is taken between logits and their own prediction; hard labels differ from it."""
        other = self.harden or self.pseudo_labels is not None or self.strong is not None
        return not other and super().labels_are_predictions(loss)

    def learned(self) -> "TwoViews":
        """The strong view, where there is one."""
        return self if self.strong is None else replace(self, unlabeled=self.strong, strong=None)

    def inner_labels(self, labels: Tensor) -> Tensor:
        """The pseudo-labels that are given, or the labels, hardened to their likeliest class. ``[N, C]``."""
        imputed = labels.argmax(-1) if self.harden else labels
        classes = imputed if self.pseudo_labels is None else self.pseudo_labels
        if classes.is_floating_point():
            return checks.shaped(classes, "pseudo_labels", "[N, C]", labels.shape).to(labels)
        if classes.dtype != torch.int64 or classes.dim() != 1 or not self.harden:
            got = f"{classes.dtype} {list(classes.shape)}"
            if not self.harden:
                raise ValueError(f"pseudo_labels must be targets [N, C] for a loss without a softmax, got {got}")
            raise ValueError(f"pseudo_labels must be int64 classes [N] or probabilities [N, C], got {got}")
        checks.targets(classes, labels, labels.shape[1], "pseudo_labels")
        return torch.nn.functional.one_hot(classes, labels.shape[1]).to(labels.dtype)


class ExampleWeights(Method):
    r"""A learned weight for each unlabeled example, from its influence on the validation loss.

    .. math:: \frac{\partial L_{val}}{\partial \lambda_u} = -\nabla L_{val}^T\, H^{-1}\, \nabla \ell_u

    (Eq. (6)), H the damped Hessian of ``mean CE(labeled) + mean_u m_u lambda_u CE(u)``, or with ``reduction="sum"`` of
    the sums that Eq. (1) and (2) print: over batches of different sizes another direction. Weights start at 1; every
    ``interval`` calls Masked Adam moves those of the batch, clipped to ``[low, high]`` (Algorithm 1). The gradients of
    the validation loss and of the examples are in the last layer or the whole model; no example's gradient is formed.

    Args:
        num_examples: M, size of the unlabeled set.
        how: ``last_layer``: in closed form, as published; else over the whole model, and how the derivative of the
            examples' losses is taken, see :func:`fastmeta.example_weight_gradient`. :meth:`refine` then needs the
            model.
        radius: length of the perturbation of a difference.
        mode: of the model in the method's own passes, ``train`` (BatchNorm takes the statistics of each batch) or
            ``eval``; None: as it stands.
        inner_loss: of the unlabeled examples and the labeled ones, as the loop trains them. Labels of a loss without a
            softmax are used as they are, not their likeliest class.
        outer_loss: of the validation examples.
        reduction: of all three losses over their examples, ``mean`` or ``sum``. Adam is blind to the scale of the
            validation loss, but not the damping to that of the Hessian.
        inverse_hessian: the choices of Fig. 3. At the last layer ``cholesky`` (exact, as published), ``pcg``, ``cg``,
            ``auto`` or ``neumann``; for the whole model ``neumann`` (Lorraine et al., 2020), ``cg`` or ``auto``; and
            ``identity``, H = I (Luketina et al., 2016). See :class:`fastmeta.directions.InverseHessian`.
        damping: added to the Hessian's diagonal, > 0.
        tol: relative residual at which iterative solvers stop, and about what the gradient of the weights is wrong by:
            little beside the noise of a batch. The published solve is exact.
        max_iter: and their limit; the number of terms of ``neumann``.
        neumann_step: of ``neumann``; None: from the largest eigenvalue.
        layers: names of the modules or parameters that the influence goes through, ``("block3", "fc")``; None: all.
            For the whole model alone.
        curvature: ``gauss_newton`` or ``hessian``; for a cross-entropy at the last layer they are the same.
        interval: N, calls from one update to the next; the calls between only read the weights.
        lr: learning rate of the weights.
        optimizer: of the weights: ``masked_adam``, or as in Fig. 4 plain ``adam``, for which all other examples have a
            gradient of 0, or ``sgd``.
        low: smallest weight.
        high: largest weight.
        bias: whether the influence goes through the layer's bias as well (last layer alone).
        masked: an example that ``mask`` leaves out has no influence.
        shared: one weight for all examples, whose gradient is the sum of theirs (Section 4.3); no ``index`` is needed.
        duplicates: of an example that comes twice in a batch, ``sum`` the gradients or use the ``last`` one.
        read: whether the step uses its weights from ``before`` or ``after`` their update.
        process_group: processes that the batch is spread over: a step is that on the joined batch, and every process
            has the complete table.
        sharded: a process keeps the rows i of the table with ``i % processes`` its rank alone; reading them, also by
            ``state_dict``, is then a call that every process makes.
        dtype: of the table.

    Raises:
        ValueError: an option is not one of those named, or a number is out of its range.
    """

    counts = True
    update: WeightTable
    lr = PartNumber("update", "lr")
    damping = PartNumber("direction", "damping")

    def __init__(
        self,
        num_examples: int,
        *,
        how: How = "last_layer",
        radius: float = 0.01,
        mode: Literal["train", "eval"] | None = None,
        inner_loss: str = "cross_entropy",
        outer_loss: str = "cross_entropy",
        reduction: Reduction = "mean",
        inverse_hessian: Solver | Literal["identity"] = "auto",
        damping: float = 0.1,
        tol: float = 1e-2,
        max_iter: int = 100,
        neumann_step: float | None = None,
        layers: tuple[str, ...] | None = None,
        curvature: Curvature = "gauss_newton",
        interval: int = 1,
        lr: float = 0.01,
        optimizer: TableOptimizer = "masked_adam",
        low: float = 0.0,
        high: float = 2.0,
        bias: bool = True,
        masked: bool = True,
        shared: bool = False,
        duplicates: Literal["sum", "last"] = "sum",
        read: Literal["before", "after"] = "after",
        process_group: Group = None,
        sharded: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        checks.choice(inverse_hessian, "inverse_hessian", *get_args(Solver), "identity")
        checks.number(damping, "damping", low=0.0)
        checks.loss_code(inner_loss, "inner_loss")
        checks.loss_code(outer_loss, "outer_loss")
        checks.choice(reduction, "reduction", "mean", "sum")
        if mode is not None:
            checks.choice(mode, "mode", "train", "eval")
        if interval < 1:
            raise ValueError(f"interval must be >= 1, got {interval}")
        if how == "last_layer" and layers is not None:
            raise ValueError(f"layers must be None for how='last_layer', got {layers}")
        if how != "last_layer" and (not bias or inverse_hessian in ("cholesky", "pcg")):
            given = "bias=False" if not bias else f"inverse_hessian={inverse_hessian!r}"
            raise ValueError(f"{given} is for how='last_layer', got how={how!r}")
        direction: DirectionRule = HoldoutGradient(outer_loss, bias=bias, reduction=reduction)
        if inverse_hessian != "identity":
            direction = InverseHessian(
                direction,
                damping=damping,
                solver=inverse_hessian,
                tol=tol,
                max_iter=max_iter,
                loss=inner_loss,
                step=neumann_step,
                layers=layers,
                curvature=curvature,
                reduction=reduction,
            )
        elif layers is not None:
            direction = InLayers(direction, layers)
        table: dict[str, Any] = {"lr": lr, "optimizer": optimizer, "low": low, "high": high}
        table |= {"read": read, "dtype": dtype}
        if shared and sharded:
            raise ValueError("sharded must be False for a shared weight, got True")
        if shared:
            update: WeightTable = SharedWeight(process_group=process_group, **table)
        else:
            update = WeightTable(
                num_examples, duplicates=duplicates, process_group=process_group, sharded=sharded, **table
            )
        self.mode = mode
        self.inner_loss = inner_loss
        self.interval = interval
        gradient = ExampleWeightGradient(inner_loss, masked=masked, how=how, radius=radius)
        super().__init__(direction, gradient, update, process_group=process_group)

    @property
    def weights(self) -> Tensor:
        """The weights of all unlabeled examples ``[M]``; ``[1]`` if they share one."""
        return self.update.table.complete()

    @classmethod
    def from_preset(
        cls, name: Literal["paper", "official_code"], num_examples: int, **overrides: Any
    ) -> "ExampleWeights":
        """The settings of the paper or of the published code; ``overrides`` are arguments of the constructor.

        Raises:
            ValueError: unknown preset.
            TypeError: unknown override.

        >>> ExampleWeights.from_preset("paper", 1000, interval=10).weights.shape
        torch.Size([1000])
        """
        return cls(num_examples, **{**asdict(preset(name)), **overrides})

    def refine(
        self, *, strong: Outputs | Inputs | None = None, pseudo_labels: Tensor | None = None, **batch: Any
    ) -> Refined:
        """See :meth:`fastmeta.Method.refine`; ``index`` is needed, ``holdout`` are validation examples.

        With ``model`` and no ``labels``, a call makes one pass over ``unlabeled`` for the labels alone where ``strong``
        is given, or where it only reads the weights.

        The caller draws the validation examples (the published code with replacement). Labels come back as they are
        imputed from ``unlabeled`` or given, ``labeled`` are examples of the Hessian, and ``holdout_gradient`` is that
        of the validation loss, in the method's ``reduction``.

        Args:
            strong: the view that the unlabeled loss is taken on; None: ``unlabeled``.
            pseudo_labels: labels of the unlabeled loss, classes ``[N]`` or probabilities ``[N, C]``; None: the
                likeliest class of the imputed ones, or of ``labels``.
            batch: the arguments of :meth:`fastmeta.Method.refine`.
        """
        harden = losses.of(self.inner_loss).has_softmax
        return self._refine(TwoViews(strong=strong, pseudo_labels=pseudo_labels, harden=harden, **batch))

    def is_due(self) -> bool:
        """Whether the next call updates the weights."""
        return (self.calls + 1) % self.interval == 0
