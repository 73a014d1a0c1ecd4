"""Not All Unlabeled Data Are Equal: Learning to Weight Data in Semi-Supervised Learning (Ren, Yeh, Schwing)."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastmeta import checks
from fastmeta.capture import Outputs
from fastmeta.derivatives import ExampleWeightGradient
from fastmeta.directions import DirectionRule, HoldoutGradient, InverseHessian, Solver
from fastmeta.methods.arguments import check_index, choice, impute
from fastmeta.methods.base import Batch, Method
from fastmeta.presets import example_weights as presets
from fastmeta.problem import Refined
from fastmeta.updates import WeightTable


class ExampleWeights(Method):
    r"""A learned weight for each unlabeled example, from its influence on the validation loss.

    .. math:: \frac{\partial L_{val}}{\partial \lambda_u} = -\nabla L_{val}^T\, H^{-1}\, \nabla \ell_u

    (Eq. (6)) in the last layer, H the damped Hessian of ``mean CE(labeled) + mean_u m_u lambda_u CE(u)``. Weights start
    at 1; every ``interval`` calls Masked Adam moves those of the batch, clipped to ``[low, high]`` (Algorithm 1).

    Args:
        num_examples: M, size of the unlabeled set.
        inverse_hessian: solver of :func:`fastmeta.ops.solve_hessian` (``cholesky`` is exact), or ``identity``: H = I
            (Luketina et al., 2016).
        damping: added to the Hessian's diagonal, > 0.
        tol: relative residual at which ``cg`` and ``pcg`` stop.
        max_iter: and their limit.
        interval: N, calls from one update to the next; the calls between only read the weights.
        lr: learning rate of Masked Adam.
        low: smallest weight.
        high: largest weight.
        bias: whether the influence goes through the layer's bias as well.
        masked: an example that ``mask`` leaves out has no influence.
        read: whether the step uses its weights from ``before`` or ``after`` their update.
        dtype: of the table.

    Raises:
        ValueError: an option is not one of those named, or a number is out of its range.
    """

    counters = ("calls",)

    def __init__(
        self,
        num_examples: int,
        *,
        inverse_hessian: Solver | Literal["identity"] = "auto",
        damping: float = 0.1,
        tol: float = 1e-4,
        max_iter: int = 100,
        interval: int = 1,
        lr: float = 0.01,
        low: float = 0.0,
        high: float = 2.0,
        bias: bool = True,
        masked: bool = True,
        read: Literal["before", "after"] = "after",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        choice(inverse_hessian, "inverse_hessian", "auto", "cholesky", "cg", "pcg", "identity")
        checks.number(damping, "damping", low=0.0)
        if interval < 1:
            raise ValueError(f"interval must be >= 1, got {interval}")
        direction: DirectionRule = HoldoutGradient(bias=bias)
        if inverse_hessian != "identity":
            direction = InverseHessian(direction, damping=damping, solver=inverse_hessian, tol=tol, max_iter=max_iter)
        self._weights = WeightTable(num_examples, lr=lr, low=low, high=high, read=read, dtype=dtype)
        self.interval = interval
        self.calls = 0
        super().__init__(direction, ExampleWeightGradient(masked=masked), self._weights)

    @property
    def weights(self) -> Tensor:
        """The weights of all unlabeled examples ``[M]``."""
        return self._weights.table.values

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
        return cls(num_examples, **{**asdict(presets.preset(name)), **overrides})

    def refine(
        self,
        *,
        unlabeled: Outputs,
        holdout: Outputs,
        targets: Tensor,
        index: Tensor | None = None,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        labeled: Outputs | None = None,
        labeled_targets: Tensor | None = None,
        strong: Outputs | None = None,
        pseudo_labels: Tensor | None = None,
        model: nn.Module | None = None,
        holdout_gradient: Mapping[str, Tensor] | None = None,
    ) -> Refined:
        """See :meth:`fastmeta.methods.Method.refine`; ``index`` is needed, ``holdout`` are validation examples.

        Args:
            unlabeled: the view that the labels are imputed from.
            holdout: validation examples.
            targets: their labels.
            index: places of the unlabeled examples in the unlabeled set ``[N]``.
            labels: imputed labels ``[N, C]``, returned as they are; None: ``softmax`` of the unlabeled logits.
            mask: 0 for an unlabeled example that the training loss leaves out, else 1, ``[N]``.
            labeled: labeled examples of the Hessian; None: the hold-out examples.
            labeled_targets: their labels.
            strong: the view that the unlabeled loss is taken on; None: ``unlabeled``.
            pseudo_labels: labels of the unlabeled loss, classes ``[N]`` or probabilities ``[N, C]``; None: the
                likeliest class of ``labels``.
            model: takes the examples as inputs; see :meth:`fastmeta.methods.Method.refine`.
        """
        return self._refine(
            {
                "unlabeled": unlabeled,
                "holdout": holdout,
                "targets": targets,
                "index": index,
                "labels": labels,
                "mask": mask,
                "labeled": labeled,
                "labeled_targets": labeled_targets,
                "strong": strong,
                "pseudo_labels": pseudo_labels,
                "model": model,
                "holdout_gradient": holdout_gradient,
            }
        )

    @torch.no_grad()
    def _compute(self, imputed: Tensor, batch: Batch) -> Refined | Tensor:
        if not self.phase():
            index = check_index(batch["index"], imputed, needed=True, method="ExampleWeights")
            assert index is not None, "needed"
            return Refined(imputed, self._weights.weights(imputed, index), imputed.new_zeros(()))
        pseudo = imputed.argmax(-1) if batch["pseudo_labels"] is None else batch["pseudo_labels"]
        view = batch["unlabeled"] if batch["strong"] is None else batch["strong"]
        labels = impute(view, _probabilities(pseudo, imputed), needs_graph=False)
        refined = super()._compute(labels, batch | {"unlabeled": view})
        assert isinstance(refined, Refined), "a table needs no graph"
        return refined._replace(labels=imputed)

    def _finish(self, computed: Refined | Tensor, imputed: Tensor, batch: Batch) -> Refined:
        self.calls += 1
        return super()._finish(computed, imputed, batch)

    def phase(self) -> bool:
        """Whether the next call updates the weights."""
        return (self.calls + 1) % self.interval == 0

    def state_dict(self) -> dict[str, Any]:
        """Table, moments and the number of calls."""
        return {**super().state_dict(), "calls": self.calls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`state_dict`; refining then goes on bit for bit.

        Raises:
            ValueError: a tensor is missing or of another shape.
        """
        super().load_state_dict(state)
        self.calls = state["calls"]


def _probabilities(pseudo_labels: Tensor, imputed: Tensor) -> Tensor:
    if pseudo_labels.is_floating_point():
        return pseudo_labels
    if pseudo_labels.dtype != torch.int64 or pseudo_labels.dim() != 1:
        got = f"{pseudo_labels.dtype} {list(pseudo_labels.shape)}"
        raise ValueError(f"pseudo_labels must be int64 classes [N] or probabilities [N, C], got {got}")
    return torch.nn.functional.one_hot(pseudo_labels, imputed.shape[1]).to(imputed.dtype)
