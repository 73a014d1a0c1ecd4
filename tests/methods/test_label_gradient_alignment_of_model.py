"""Label Gradient Alignment of the whole model: Eq. (2) by plain autograd, the labeled loss's T(i), what a step runs."""

from typing import Any

import pytest
import torch
from brute_force import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from whole_model_brute_force import brute_force_alignment_gradient, forward, loss_gradient, reduced_loss
from whole_model_nets import NETS, NetCase, batch_size, net_cases

from fastmeta import LabelGradientAlignment

M = 9
AVERAGES = {"decay": 0.8, "decay_norm": 0.6, "epsilon": 1e-3}
EXACT = ["jvp", "double_backward"]
exact = pytest.mark.parametrize("how", EXACT)


class Algorithm1:
    """The averages and the gradient of Eq. (2), parameter by parameter, from ``loss_gradient`` alone."""

    def __init__(self, loss: str = "cross_entropy", reduction: str = "mean", include_current: bool = True) -> None:
        self.loss, self.reduction, self.include_current = loss, reduction, include_current
        self.ema: dict[str, Tensor] = {}
        self.fourth: dict[str, Tensor] = {}

    def labels_of(self, w: Tensor) -> Tensor:
        return w.softmax(-1) if self.loss == "cross_entropy" else w

    def gradient(self, case: NetCase, targets: Tensor, w: Tensor, mask: Tensor | None = None) -> Tensor:
        options = {"loss": self.loss, "reduction": self.reduction}
        g_l = loss_gradient(case.model, case.holdout, targets, **options)
        g_u = loss_gradient(case.model, case.inputs, self.labels_of(w), weights=mask, **options)
        before = self.ema or g_l, self.fourth or {n: (g_l[n] - g_u[n]) ** 4 for n in g_l}
        ema = {n: 0.8 * before[0][n] + 0.2 * g_l[n] for n in g_l}
        used = ema if self.include_current else before[0]
        fourth = {n: 0.6 * before[1][n] + 0.4 * (used[n] - g_u[n]) ** 4 for n in g_l}
        averages = (ema, fourth) if self.include_current else before
        self.ema, self.fourth = ema, fourth
        return brute_force_alignment_gradient(
            case.model, case.inputs, w, *averages, epsilon=1e-3, weights=mask, labels_of=self.labels_of, **options
        )


def make_case(net: str, generator: torch.Generator, train: bool = True) -> NetCase:
    model, make_inputs = NETS[net](generator)
    return NetCase(model.train(train), make_inputs(5), make_inputs(4), generator)


def make_method(case: NetCase, **options: Any) -> LabelGradientAlignment:
    return LabelGradientAlignment(M, case.classes, dtype=torch.float64, **AVERAGES, **options)


def targets_of(case: NetCase) -> Tensor:
    return torch.randint(case.classes, (batch_size(case.holdout),), generator=case.generator)


def check_steps(case: NetCase, method: LabelGradientAlignment, reference: Algorithm1, count: int = 3) -> None:
    """Adam on the objective, over batches whose labeled targets and mask differ."""
    n = batch_size(case.inputs)
    index = torch.randperm(M, generator=case.generator)[:n]
    w = torch.randn(M, case.classes, generator=case.generator, dtype=torch.float64)
    state = method.state_dict()
    state["update.table.values"] = w.clone()
    method.load_state_dict(state)
    moving = w[index].clone().requires_grad_()
    adam = torch.optim.Adam([moving], lr=method.update.table.lr)
    for _ in range(count):
        targets, mask = targets_of(case), (torch.rand(n, generator=case.generator) > 0.2).double()
        refined = method.refine(
            model=case.model, unlabeled=case.inputs, holdout=case.holdout, targets=targets, index=index, mask=mask
        )
        assert_close(refined.labels, reference.labels_of(moving.detach()), 1e-8)
        moving.grad = reference.gradient(case, targets, moving.detach(), mask)
        adam.step()
    moments = method.state_dict()["update.table.exp_avg"][index]
    assert_close(moments, adam.state[moving]["exp_avg"], 1e-8)
    w[index] = moving.detach()
    assert_close(method.label_logits, w, 1e-8)


@exact
@pytest.mark.parametrize("net", list(NETS))
def test_gradient_with_respect_to_the_label_logits(generator, net, how):
    case = make_case(net, generator)
    index = torch.tensor([8, 1, 3, 0, 5])
    targets, w = targets_of(case), torch.randn(M, case.classes, generator=generator, dtype=torch.float64)
    method = make_method(case, how=how)
    state = method.state_dict()
    state["update.table.values"] = w.clone()
    method.load_state_dict(state)
    method.refine(model=case.model, unlabeled=case.inputs, holdout=case.holdout, targets=targets, index=index)
    expected = Algorithm1().gradient(case, targets, w[index])
    assert_close(method.state_dict()["update.table.exp_avg"][index] / (1 - 0.9), expected)


OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "averages before the batch": {"include_current": False},
    "sums": {"reduction": "sum"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_several_steps_are_adam_on_the_objective(generator, options):
    case = make_case("conv", generator, train=False)
    check_steps(case, make_method(case, how="jvp", lr=0.3, **options), Algorithm1(**options))


@exact
def test_regression_has_the_labels_themselves_as_parameters(generator, how):
    case = make_case("mlp", generator)
    method = make_method(case, how=how, inner_loss="mse")
    index, targets = torch.arange(5), torch.randn(4, 3, generator=generator, dtype=torch.float64)
    refined = method.refine(model=case.model, unlabeled=case.inputs, holdout=case.holdout, targets=targets, index=index)
    assert torch.equal(refined.labels, torch.zeros(5, 3, dtype=torch.float64))
    expected = Algorithm1("mse").gradient(case, targets, torch.zeros(5, 3, dtype=torch.float64))
    assert_close(method.state_dict()["update.table.exp_avg"][index] / (1 - 0.9), expected)
    moved = method.label_logits[index].clone()
    again = method.refine(model=case.model, unlabeled=case.inputs, holdout=case.holdout, targets=targets, index=index)
    assert torch.equal(again.labels, moved)


@settings(max_examples=12, deadline=None)
@given(case=net_cases(), how=st.sampled_from(EXACT), include_current=st.booleans())
def test_any_shape(case: NetCase, how: str, include_current: bool):
    reference = Algorithm1(include_current=include_current)
    check_steps(case, make_method(case, how=how, include_current=include_current), reference, count=2)


def test_last_layer_of_the_model(generator):
    """``how="last_layer"`` is the whole model where only the last layer moves."""
    case = make_case("conv", generator, train=False)
    case.model.requires_grad_(False)
    case.model.fc.requires_grad_(True)
    for how in ("last_layer", "jvp"):
        check_steps(case, make_method(case, how=how), Algorithm1())


@pytest.mark.parametrize(("how", "order"), [("finite_difference", 2), ("forward_difference", 1)])
def test_differences_converge_to_the_exact_gradient(generator, how, order):
    case = make_case("conv", generator)
    targets, index = targets_of(case), torch.arange(5)

    def gradient(how: str, radius: float) -> Tensor:
        method = make_method(case, how=how, radius=radius)
        method.refine(model=case.model, unlabeled=case.inputs, holdout=case.holdout, targets=targets, index=index)
        return method.state_dict()["update.table.exp_avg"][index]

    truth = gradient("jvp", 1.0)
    coarse, fine = (float((gradient(how, radius) - truth).norm()) for radius in (2e-3, 1e-3))
    assert 0.9 * 2**order < coarse / fine < 1.1 * 2**order


@pytest.mark.parametrize("how", ["jvp", "last_layer"])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_schedule_of_the_labeled_loss_takes_the_loops_own_logits(generator, how, loss):
    """``own + Refined.loss`` is T(i) times the loop's own labeled loss, at no pass of the method's own."""
    case = make_case("mlp", generator)
    method = make_method(case, how=how, inner_loss=loss, labeled_weight=lambda step: [1.0, 3.0][step])
    targets = targets_of(case)
    targets = targets if loss == "cross_entropy" else functional.one_hot(targets, 3).double()
    batch = {"model": case.model, "unlabeled": case.inputs, "holdout": case.holdout, "targets": targets}
    batch |= {"index": torch.arange(5)}
    with pytest.raises(ValueError, match="labeled_logits are needed with model and labeled_weight"):
        method.refine(**batch)
    logits = forward(case.model, case.holdout)
    assert method.refine(**batch, labeled_logits=logits).loss.item() == 0
    loss_of_step = method.refine(**batch, labeled_logits=logits).loss
    own = reduced_loss(logits, targets, loss)
    weight = case.model.fc.weight
    expected = torch.autograd.grad(3 * own, weight, retain_graph=True)[0]
    assert_close(torch.autograd.grad(own + loss_of_step, weight)[0], expected)


def test_what_a_step_runs(generator):
    """One pass for each gradient, one for the derivative; none for a labeled gradient that the loop has."""
    case = make_case("mlp", generator)
    made: list[str] = []

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        made.append("holdout" if inputs[0].equal(case.holdout) else "unlabeled")

    case.model.register_forward_pre_hook(hook)
    targets, index = targets_of(case), torch.arange(5)
    first, second = make_method(case, how="jvp"), make_method(case, how="jvp")
    given = loss_gradient(case.model, case.holdout, targets)
    made.clear()
    first.refine(model=case.model, unlabeled=case.inputs, holdout=case.holdout, targets=targets, index=index)
    assert sorted(made) == ["holdout", "unlabeled", "unlabeled"]
    made.clear()
    second.refine(model=case.model, unlabeled=case.inputs, holdout_gradient=given, index=index)
    assert made == ["unlabeled", "unlabeled"]
    assert_close(first.label_logits, second.label_logits)
    assert bool((first.label_logits != 0).any())


def test_mode_of_the_passes(generator):
    """BatchNorm's statistics: those of each batch, or the running ones, whatever mode the model is in."""
    case = make_case("conv", generator)
    targets, index = targets_of(case), torch.arange(5)

    def gradient(mode: str | None, train: bool) -> Tensor:
        method = make_method(case, how="jvp", mode=mode)
        case.model.train(train)
        method.refine(model=case.model, unlabeled=case.inputs, holdout=case.holdout, targets=targets, index=index)
        assert case.model.training == train
        return method.state_dict()["update.table.exp_avg"]

    assert torch.equal(gradient("eval", True), gradient(None, False))
    assert torch.equal(gradient("train", False), gradient(None, True))
    assert not torch.allclose(gradient(None, True), gradient(None, False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"how": "vjp"}, "how must be one of"),
        ({"mode": "test"}, "mode must be one of train, eval"),
        ({"inner_loss": "mse_probs"}, "inner_loss must be one of cross_entropy, mse"),
        ({"reduction": "none"}, "reduction must be one of mean, sum"),
        ({"epsilon": -1.0}, "epsilon must be >= 0"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        LabelGradientAlignment(5, 3, **options)
