"""Not All Unlabeled Data Are Equal: Learning to Weight Data in Semi-Supervised Learning (Ren, Yeh, Schwing)."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastmeta import checks
from fastmeta.capture import Outputs
from fastmeta.derivatives import ExampleWeightGradient, How
from fastmeta.directions import DirectionRule, HoldoutGradient, InLayers, InverseHessian, Solver
from fastmeta.methods.base import Method
from fastmeta.methods.batch import Batch, as_outputs, check_rows, count_of
from fastmeta.ops.process_group import Group
from fastmeta.problem import Curvature
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
    inverse_hessian: Solver = "cholesky"
    interval: int = 100
    lr: float = 0.01
    low: float = 0.0
    high: float = 2.0


# N: the paper's text and Table 3, and the default of the code's flag, say 100; the README of the code gives 512 among
# "the hyper-parameters used in the paper". The clip to [0, 2] and the initial weight of 1 are the code's alone.
PRESETS = {
    # Eq. (6): H of the training loss, whose weight decay is 5e-4; the unlabeled loss of an example includes its mask;
    # "the last layer"; an example that was drawn twice has the gradient of both; Algorithm 1 trains on the weights
    # after their update.
    "paper": ExampleWeightsPreset(damping=5e-4, bias=True, masked=True, read="after", duplicates="sum"),
    # main.py: weight decay enters the Hessian with coefficient 1, the kernel alone, no mask in an example's gradient;
    # NumPy's assignment by index keeps the last of an example drawn twice; the step uses the weights read before the
    # update.
    "official_code": ExampleWeightsPreset(damping=1.0, bias=False, masked=False, read="before", duplicates="last"),
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

    def check(self, how: str, needs_index: bool, learns: bool, method: str) -> None:
        """See :meth:`Batch.check`."""
        super().check(how, needs_index, learns, method)
        for name in ("strong", "pseudo_labels"):
            value = getattr(self, name)
            if value is None:
                continue
            if name == "strong" and self.model is None:
                check_rows(value, name, as_outputs(self.unlabeled, "unlabeled"))
            elif isinstance(value, Outputs):
                raise TypeError(f"{name} must be inputs of the model where model is given, got Outputs")
            if count_of(value, name) != self.count:
                raise ValueError(f"{name} must have N = {self.count} like unlabeled, got {count_of(value, name)}")

    def learned(self) -> "TwoViews":
        """The strong view, where there is one."""
        return self if self.strong is None else replace(self, unlabeled=self.strong, strong=None)

    def inner_labels(self, labels: Tensor) -> Tensor:
        """The pseudo-labels that are given, or the likeliest class of the labels. ``[N, C]``."""
        classes = labels.argmax(-1) if self.pseudo_labels is None else self.pseudo_labels
        if classes.is_floating_point():
            return checks.shaped(classes, "pseudo_labels", "[N, C]", labels.shape).to(labels)
        if classes.dtype != torch.int64 or classes.dim() != 1:
            got = f"{classes.dtype} {list(classes.shape)}"
            raise ValueError(f"pseudo_labels must be int64 classes [N] or probabilities [N, C], got {got}")
        return torch.nn.functional.one_hot(classes, labels.shape[1]).to(labels.dtype)


class ExampleWeights(Method):
    r"""A learned weight for each unlabeled example, from its influence on the validation loss.

    .. math:: \frac{\partial L_{val}}{\partial \lambda_u} = -\nabla L_{val}^T\, H^{-1}\, \nabla \ell_u

    (Eq. (6)), H the damped Hessian of ``mean CE(labeled) + mean_u m_u lambda_u CE(u)``. Weights start at 1; every
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
        lr: learning rate of Masked Adam.
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
        inverse_hessian: Solver | Literal["identity"] = "auto",
        damping: float = 0.1,
        tol: float = 1e-2,
        max_iter: int = 100,
        neumann_step: float | None = None,
        layers: tuple[str, ...] | None = None,
        curvature: Curvature = "gauss_newton",
        interval: int = 1,
        lr: float = 0.01,
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
        if mode is not None:
            checks.choice(mode, "mode", "train", "eval")
        if interval < 1:
            raise ValueError(f"interval must be >= 1, got {interval}")
        if how == "last_layer" and layers is not None:
            raise ValueError(f"layers must be None for how='last_layer', got {layers}")
        if how != "last_layer" and (not bias or inverse_hessian in ("cholesky", "pcg")):
            given = "bias=False" if not bias else f"inverse_hessian={inverse_hessian!r}"
            raise ValueError(f"{given} is for how='last_layer', got how={how!r}")
        direction: DirectionRule = HoldoutGradient(bias=bias)
        if inverse_hessian != "identity":
            direction = InverseHessian(
                direction,
                damping=damping,
                solver=inverse_hessian,
                tol=tol,
                max_iter=max_iter,
                step=neumann_step,
                layers=layers,
                curvature=curvature,
            )
        elif layers is not None:
            direction = InLayers(direction, layers)
        table: dict[str, Any] = {"lr": lr, "low": low, "high": high, "read": read, "dtype": dtype}
        if shared and sharded:
            raise ValueError("sharded must be False for a shared weight, got True")
        if shared:
            update: WeightTable = SharedWeight(process_group=process_group, **table)
        else:
            update = WeightTable(
                num_examples, duplicates=duplicates, process_group=process_group, sharded=sharded, **table
            )
        self.mode = mode
        self.interval = interval
        gradient = ExampleWeightGradient(masked=masked, how=how, radius=radius)
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
        of the mean validation loss.

        Args:
            strong: the view that the unlabeled loss is taken on; None: ``unlabeled``.
            pseudo_labels: labels of the unlabeled loss, classes ``[N]`` or probabilities ``[N, C]``; None: the
                likeliest class of the imputed ones.
            batch: the arguments of :meth:`fastmeta.Method.refine`.
        """
        return self._refine(TwoViews(strong=strong, pseudo_labels=pseudo_labels, **batch))

    def learns(self) -> bool:
        """Whether the next call updates the weights."""
        return (self.calls + 1) % self.interval == 0
