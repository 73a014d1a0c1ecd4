"""Not All Unlabeled Data Are Equal: Learning to Weight Data in Semi-Supervised Learning (Ren, Yeh, Schwing)."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastmeta import checks, losses
from fastmeta.capture import Outputs
from fastmeta.derivatives import ExampleWeightGradient, How
from fastmeta.directions import DirectionRule, HoldoutGradient, InLayers, InverseHessian, Solver
from fastmeta.methods.arguments import check_index, check_model_batch, choice, impute
from fastmeta.methods.base import Batch, Method
from fastmeta.model_function import Inputs, ModelFunction, batch_size
from fastmeta.model_problem import AnyProblem, ModelProblem, full_precision
from fastmeta.presets import example_weights as presets
from fastmeta.problem import Curvature, Refined
from fastmeta.process_group import Group
from fastmeta.updates import SharedWeight, WeightTable


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
        process_group: processes that the batch is spread over, whose gradients are summed; each keeps the weights of
            the examples it draws.
        dtype: of the table.

    Raises:
        ValueError: an option is not one of those named, or a number is out of its range.
    """

    counters = ("calls",)

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
        dtype: torch.dtype = torch.float32,
    ) -> None:
        choice(inverse_hessian, "inverse_hessian", *get_args(Solver), "identity")
        checks.number(damping, "damping", low=0.0)
        if mode is not None:
            choice(mode, "mode", "train", "eval")
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
        if shared:
            self._weights: WeightTable = SharedWeight(process_group=process_group, **table)
        else:
            self._weights = WeightTable(num_examples, duplicates=duplicates, **table)
        self.mode = mode
        self.interval = interval
        self.calls = 0
        gradient = ExampleWeightGradient(masked=masked, how=how, radius=radius)
        super().__init__(direction, gradient, self._weights, process_group=process_group)

    @property
    def weights(self) -> Tensor:
        """The weights of all unlabeled examples ``[M]``; ``[1]`` if they share one."""
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
        unlabeled: Outputs | Inputs,
        holdout: Outputs | Inputs | None = None,
        targets: Tensor | None = None,
        index: Tensor | None = None,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        labeled: Outputs | Inputs | None = None,
        labeled_targets: Tensor | None = None,
        model: nn.Module | None = None,
        holdout_gradient: Mapping[str, Tensor] | None = None,
        strong: Outputs | Inputs | None = None,
        pseudo_labels: Tensor | None = None,
    ) -> Refined:
        """See :meth:`fastmeta.Method.refine`; ``index`` is needed, ``holdout`` are validation examples.

        With ``model`` and no ``labels``, a call makes one pass over ``unlabeled`` for the labels alone where ``strong``
        is given, or where it only reads the weights.

        Args:
            unlabeled: the view that the labels are imputed from.
            holdout: validation examples, drawn by the caller (the published code draws them with replacement).
            targets: their labels.
            index: places of the unlabeled examples in the unlabeled set ``[N]``.
            labels: imputed labels ``[N, C]``, returned as they are; None: ``softmax`` of the unlabeled logits.
            mask: 0 for an unlabeled example that the training loss leaves out, else 1, ``[N]``.
            labeled: labeled examples of the Hessian; None: the hold-out examples.
            labeled_targets: their labels.
            model: takes the examples as inputs.
            holdout_gradient: gradient of the mean validation loss by parameter name, where the loop has it already.
            strong: the view that the unlabeled loss is taken on; None: ``unlabeled``.
            pseudo_labels: labels of the unlabeled loss, classes ``[N]`` or probabilities ``[N, C]``; None: the
                likeliest class of ``labels``.
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
                "model": model,
                "holdout_gradient": holdout_gradient,
                "strong": strong,
                "pseudo_labels": pseudo_labels,
            }
        )

    @torch.no_grad()
    def _compute(self, imputed: Tensor, batch: Batch) -> Refined | Tensor:
        if not self.phase():
            index = check_index(batch["index"], imputed, self.update.needs_index, type(self).__name__)
            return Refined(imputed, self._weights.weights(imputed, index), imputed.new_zeros(()))
        view = batch["unlabeled"] if batch["strong"] is None else batch["strong"]
        labels = impute(view, _pseudo(imputed, batch["pseudo_labels"]), needs_graph=False)
        refined = super()._compute(labels, batch | {"unlabeled": view})
        assert isinstance(refined, Refined), "a table needs no graph"
        return refined._replace(labels=imputed)

    def _refine_model(self, batch: Batch) -> Refined:
        function = ModelFunction(batch["model"], mode=self.mode)
        like = next(iter(function.parameters.values()))
        index = check_model_batch(batch, like, self.update.needs_index, type(self).__name__)
        _check_views(batch)
        labels = batch["labels"]
        if labels is None and (batch["strong"] is not None or not self.phase()):
            with torch.no_grad():
                labels = losses.prediction(full_precision(function.logits(batch["unlabeled"])), self.inner_loss)
        if not self.phase():
            labels = full_precision(labels.detach())
            weights = self._weights.weights(labels, index)
            return self._finish(Refined(labels, weights, labels.new_zeros(())), labels, batch)
        # From here on the labels are what matters of the weak view.
        view = batch["unlabeled"] if batch["strong"] is None else batch["strong"]
        return super()._refine_model({**batch, "unlabeled": view, "strong": None, "labels": labels})

    def _model_problem(self, function: ModelFunction, batch: Batch) -> tuple[ModelProblem, Tensor | None]:
        problem, index = super()._model_problem(function, batch)
        given, pseudo_labels = problem.impute, batch["pseudo_labels"]
        if isinstance(given, Tensor):
            return replace(problem, impute=_pseudo(given, pseudo_labels)), index
        return replace(problem, impute=lambda logits: _pseudo(given(logits), pseudo_labels)), index

    def _step(self, problem: AnyProblem, index: Tensor | None) -> Refined | Tensor:
        refined = super()._step(problem, index)
        assert isinstance(refined, Refined), "a table needs no graph"
        if isinstance(problem, ModelProblem) and not isinstance(problem.impute, Tensor):
            return refined._replace(labels=losses.prediction(problem.logits, self.inner_loss))
        return refined

    def _finish(self, computed: Refined | Tensor, imputed: Tensor, batch: Batch) -> Refined:
        self.calls += 1
        refined = super()._finish(computed, imputed, batch)
        if batch["model"] is not None and batch["labels"] is not None:
            return refined._replace(labels=full_precision(batch["labels"].detach()))
        return refined

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


def _pseudo(imputed: Tensor, pseudo_labels: Tensor | None) -> Tensor:
    """Labels of the unlabeled loss ``[N, C]``: those given, or the likeliest class of the imputed ones ``[N, C]``."""
    classes = imputed.argmax(-1) if pseudo_labels is None else pseudo_labels
    if classes.is_floating_point():
        return checks.shaped(classes, "pseudo_labels", "[N, C]", imputed.shape).to(imputed)
    if classes.dtype != torch.int64 or classes.dim() != 1:
        got = f"{classes.dtype} {list(classes.shape)}"
        raise ValueError(f"pseudo_labels must be int64 classes [N] or probabilities [N, C], got {got}")
    return torch.nn.functional.one_hot(classes, imputed.shape[1]).to(imputed.dtype)


def _check_views(batch: Batch) -> None:
    count = batch_size(batch["unlabeled"], "unlabeled")
    for name in ("strong", "pseudo_labels"):
        if batch[name] is not None and batch_size(batch[name], name) != count:
            raise ValueError(f"{name} must have N = {count} like unlabeled, got {batch_size(batch[name], name)}")
