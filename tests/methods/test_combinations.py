"""Combinations that no paper has: against brute force, and against the same rules put together by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from brute_force import assert_close, make_layer
from cases import Draw
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor, nn
from torch.autograd import forward_ad
from whole_model_brute_force import (
    Bilevel,
    brute_force_alignment_gradient,
    brute_force_label_gradient,
    brute_force_weight_gradient,
    dense_hessian,
    flatten,
    forward,
    loss_gradient,
    trainable,
)
from whole_model_nets import NETS, NetCase, batch_size, net_cases

from fastmeta import AlignedImputation, ImplicitImputation, ImputeAndWeight, Method, Refined
from fastmeta.derivatives import HOWS, ExampleWeightGradient, LabelAndWeightGradient, LabelGradient
from fastmeta.directions import HoldoutGradient, InverseHessian, LookAhead, NormalizedGap, UnitLength
from fastmeta.updates import LabelLogitStep, PullBack, PullBackAndWeights, WeightTable

M, N, C = 9, 5, 3
EXACT = ("jvp", "double_backward")
exact = pytest.mark.parametrize("how", EXACT)
nets = pytest.mark.parametrize("net", list(NETS))


class Step:
    """A model, a batch whose labels come from a weak view, and what the loss of a step pulls back to."""

    def __init__(self, case: NetCase) -> None:
        self.model, self.unlabeled, self.holdout, self.generator = case
        weak = make_weak(self.unlabeled, self.generator)
        self.labels = (2 * forward(self.model, weak)).softmax(-1)  # sharpened
        self.targets = torch.randint(case.classes, (batch_size(self.holdout),), generator=self.generator)

    def batch(self, **more: Any) -> dict[str, Any]:
        return {
            "model": self.model,
            "unlabeled": self.unlabeled,
            "holdout": self.holdout,
            "targets": self.targets,
            "labels": self.labels,
            **more,
        }

    def problem(self, **options: Any) -> Bilevel:
        labels = self.labels.detach()
        return Bilevel(self.model, self.unlabeled, labels, self.holdout, self.targets, loss="cross_entropy", **options)

    def pulled_back(self, cotangent: Tensor) -> Tensor:
        """``sum_i <cotangent_i, labels_i>`` through the weak view, as one vector."""
        return self.of_loss((cotangent * self.labels).sum())

    def of_loss(self, loss: Tensor) -> Tensor:
        own = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        grads = torch.autograd.grad(loss, own, retain_graph=True, materialize_grads=True)
        return torch.cat([grad.flatten() for grad in grads])


def make_weak(inputs: Any, generator: Generator) -> Any:
    """Another view: noise on what is real, the tokens in another order."""
    if isinstance(inputs, dict):
        return {**inputs, "input_ids": inputs["input_ids"].flip(1)}
    if isinstance(inputs, tuple):
        return tuple(make_weak(part, generator) for part in inputs)
    return inputs + torch.randn(inputs.shape, generator=generator, dtype=inputs.dtype)


def make_step(net: str, generator: Generator, train: bool = True) -> Step:
    model, make_inputs = NETS[net](generator, classes=C)
    return Step(NetCase(model.train(train), make_inputs(N), make_inputs(4), generator))


def seen_by_adam(method: Method, index: Tensor) -> Tensor:
    """After one update the first moment is (1 - beta1) times the gradient."""
    return method.state_dict()["update.table.exp_avg"][index] / (1 - 0.9)


def set_weights(method: ImputeAndWeight, weights: Tensor) -> None:
    state = method.state_dict()
    state["update.table.values"] = weights.clone()
    method.load_state_dict(state)


@exact
@nets
@pytest.mark.parametrize("loss", ["cross_entropy", "mse_probs"])
def test_aligned_imputation_is_the_gradient_of_eq_2_through_the_imputer(generator, net, how, loss):
    step = make_step(net, generator)
    refined = AlignedImputation(how=how, inner_loss=loss, unit_length=False, weight=0.7).refine(**step.batch())
    labels = step.labels.detach()
    g_l = loss_gradient(step.model, step.holdout, step.targets, loss)
    g_u = loss_gradient(step.model, step.unlabeled, labels, loss)
    fourth = {name: (g_l[name] - g_u[name]) ** 4 for name in g_l}
    gradient = brute_force_alignment_gradient(
        step.model, step.unlabeled, labels, g_l, fourth, loss=loss, labels_of=lambda labels: labels
    )
    assert_close(step.of_loss(refined.loss), step.pulled_back(0.7 * gradient))
    assert torch.equal(refined.labels, labels)


@pytest.mark.parametrize(
    ("net", "how", "layers"),
    [
        ("conv", "jvp", None),
        ("tied", "double_backward", None),
        ("mlp", "jvp", None),
        ("text", "jvp", ("norm", "fc")),
        ("conv", "double_backward", ("body.4", "fc")),
    ],
)
def test_implicit_imputation_is_the_implicit_function_theorem(generator, net, how, layers):
    """Every factor dense: ``d/dz <(H + damping)^{-1} grad C^H, -grad C^U(z)>``, over all parameters or some layers'."""
    step = make_step(net, generator)
    names = tuple(n for n in trainable(step.model) if layers is None or n.startswith(tuple(f"{x}." for x in layers)))
    problem = step.problem(labeled_weight=1.0)
    hessian = dense_hessian(problem, names)
    damping = 1 - min(0.0, float(torch.linalg.eigvalsh((hessian + hessian.T) / 2)[0]))
    method = ImplicitImputation(
        how=how,
        unit_length=False,
        damping=damping,
        curvature="hessian",
        layers=layers,
        tol=1e-12,
        max_iter=1000,
        weight=1.0,
    )
    refined = method.refine(**step.batch())
    g = flatten(loss_gradient(step.model, step.holdout, step.targets), names)
    v = torch.linalg.solve(hessian + damping * torch.eye(len(g), dtype=g.dtype), g)
    z = step.labels.detach().requires_grad_()
    theta = {name: value.requires_grad_() for name, value in trainable(step.model).items()}
    value = problem.inner_loss(theta, z)
    inner = torch.autograd.grad(value, [theta[name] for name in names], create_graph=True, materialize_grads=True)
    dz = torch.autograd.grad(-(torch.cat([part.flatten() for part in inner]) @ v), z)[0]
    assert_close(step.of_loss(refined.loss), step.pulled_back(dz))


def check_impute_and_weight(step: Step, how: str, index: Tensor) -> None:
    n = len(step.labels)
    weights = 2 * torch.rand(M, generator=step.generator, dtype=torch.float64)
    mask = (torch.rand(n, generator=step.generator) > 0.3).double()
    method = ImputeAndWeight(
        M, how=how, look_ahead=True, unit_length=False, rate=0.4, weight=0.7, read="before", dtype=torch.float64
    )
    set_weights(method, weights)
    refined = method.refine(**step.batch(index=index, mask=mask))
    problem = step.problem(weights=weights[index], mask=mask, rate=0.4)
    assert_close(step.of_loss(refined.loss), step.pulled_back(0.7 * brute_force_label_gradient(problem)))
    assert_close(seen_by_adam(method, index), brute_force_weight_gradient(problem))
    assert torch.equal(refined.weights, weights[index])


@exact
@nets
def test_impute_and_weight_differentiates_the_inner_step(generator, net, how):
    check_impute_and_weight(make_step(net, generator), how, torch.tensor([7, 0, 3, 8, 1]))


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_impute_and_weight_at_the_last_layer(generator, train):
    """The fused kernels, where the last layer alone moves; the imputer's other layers stay out of it."""
    step = make_step("conv", generator, train)
    step.model.requires_grad_(False)
    step.model.fc.requires_grad_(True)
    features = torch.randn(N, step.model.fc.in_features, generator=generator, dtype=torch.float64)
    step.labels = step.model.fc(features).softmax(-1)
    for how in ("last_layer", "jvp"):
        check_impute_and_weight(step, how, torch.tensor([7, 0, 3, 8, 1]))


@settings(max_examples=15, deadline=None)
@given(case=net_cases(), how=st.sampled_from(EXACT))
def test_impute_and_weight_of_any_shape(case: NetCase, how: str):
    step = Step(case)
    check_impute_and_weight(step, how, torch.randperm(M, generator=case.generator)[: len(step.labels)])


@pytest.mark.parametrize(("how", "order"), [("finite_difference", 2), ("forward_difference", 1)])
def test_differences_converge_to_the_exact_gradients(generator, how, order):
    step = make_step("conv", generator)
    index = torch.arange(N)

    def gradients(how: str, radius: float) -> Tensor:
        method = ImputeAndWeight(M, how=how, radius=radius, dtype=torch.float64)
        refined = method.refine(**step.batch(index=index))
        return torch.cat([step.of_loss(refined.loss), seen_by_adam(method, index)])

    truth = gradients("jvp", 1.0)
    coarse, fine = (float((gradients(how, radius) - truth).norm()) for radius in (2e-3, 1e-3))
    assert 0.9 * 2**order < coarse / fine < 1.1 * 2**order
    assert fine < 1e-2 * float(truth.norm())


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The passes that are made of a model: forward mode or plain."""
    made: list[str] = []
    real = nn.Linear.forward

    def counted(layer: nn.Linear, inputs: Tensor) -> Tensor:
        if layer.out_features == C:  # the last layer
            dual = forward_ad.unpack_dual(layer.weight).tangent is not None
            made.append("forward mode" if dual else "plain")
        return real(layer, inputs)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    return made


def test_labels_and_weights_come_out_of_one_pass_of_forward_mode(generator, passes):
    step = make_step("conv", generator)
    passes.clear()
    ImputeAndWeight(M, how="jvp").refine(**step.batch(index=torch.arange(N)))
    assert passes == ["plain", "forward mode"], "the hold-out gradient, and one pass for both derivatives"


@pytest.mark.parametrize("how", HOWS)
def test_one_pass_gives_what_two_derivatives_give(generator, how):
    step = make_step("conv", generator)
    if how == "last_layer":
        layer = make_layer(Draw(generator))
        batch = layer.batch() | {"labels": torch.rand(6, 4, generator=generator, dtype=torch.float64).softmax(-1)}
        columns, n = 4, 6
    else:
        batch, columns, n = step.batch(labels=step.labels.detach()), C, N

    problems = []

    class Seen:
        def __call__(self, problem):
            problems.append(problem)
            return HoldoutGradient()(problem)

    Method(Seen(), LabelGradient("cross_entropy", how=how), LabelLogitStep(step=1.0)).refine(**batch)
    problem = problems[0]
    v = HoldoutGradient()(problem)
    options = {"rate": 0.3, "how": how, "radius": 1e-3}
    both = LabelAndWeightGradient(**options)(problem, v)
    assert both.shape == (n, columns + 1)
    assert_close(both[:, :-1], LabelGradient("cross_entropy", **options)(problem, v))
    assert_close(both[:, -1], ExampleWeightGradient(reduction="mean", **options)(problem, v))


TABLE = {"lr": 0.01, "low": 0.0, "high": 2.0, "read": "after"}
GAP = {"decay": 0.9, "decay_norm": 0.8}
COMPOSED: dict[str, tuple[Callable[[], Method], Callable[[], Method]]] = {
    "aligned": (
        lambda: AlignedImputation(**GAP),
        lambda: Method(UnitLength(NormalizedGap(**GAP)), LabelGradient("cross_entropy"), PullBack(weight=0.5)),
    ),
    "implicit V2": (
        lambda: ImplicitImputation(unit_length=False, damping=0.3),
        lambda: Method(InverseHessian(damping=0.3), LabelGradient("cross_entropy"), PullBack(weight=0.5)),
    ),
    "implicit V1": (
        lambda: ImplicitImputation("V1", inner_loss="mse_probs", label_step=3.0),
        lambda: Method(UnitLength(InverseHessian(loss="mse_probs")), LabelGradient(), LabelLogitStep(step=3.0)),
    ),
    "impute and weight": (
        lambda: ImputeAndWeight(M, look_ahead=True, inner_loss="mse_probs"),
        lambda: Method(
            LookAhead(UnitLength()), LabelAndWeightGradient("mse_probs"), PullBackAndWeights(M, weight=0.5, **TABLE)
        ),
    ),
}


@pytest.mark.parametrize(("named", "composed"), COMPOSED.values(), ids=COMPOSED)
def test_a_name_for_three_rules(draw, named, composed):
    """Bit for bit, over steps: averages and tables included."""
    one, other = named(), composed()
    index = torch.tensor([4, 0, 8, 7, 2, 5])
    for _ in range(3):
        layer = make_layer(draw)
        labels = layer.outputs(draw.normal(6, 5)).logits.softmax(-1)
        first, second = (method.refine(**layer.batch(), index=index, labels=labels) for method in (one, other))
        assert_equal(layer.weight, first, second)
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name])


def assert_equal(weight: Tensor, first: Refined, second: Refined) -> None:
    assert torch.equal(first.labels, second.labels)
    assert torch.equal(first.weights, second.weights)
    assert first.loss.requires_grad == second.loss.requires_grad
    if first.loss.requires_grad:
        grads = [torch.autograd.grad(refined.loss, weight, retain_graph=True)[0] for refined in (first, second)]
        assert torch.equal(*grads)
        assert bool(grads[0].abs().sum() > 0)


def test_weights_and_labels_follow_their_own_rules(draw):
    """ImputeAndWeight is L2I's pull-back and a table of weights beside each other, of one inner step."""
    layer = make_layer(draw)
    labels = layer.outputs(draw.normal(6, 5)).logits.softmax(-1)
    batch = layer.batch() | {"labels": labels, "index": torch.arange(6)}
    joint = ImputeAndWeight(6, lr=0.1, dtype=torch.float64)
    labels_alone = Method(UnitLength(), LabelGradient("cross_entropy"), PullBack(weight=0.5))
    weights_alone = Method(
        UnitLength(), ExampleWeightGradient(reduction="mean"), WeightTable(6, lr=0.1, read="after", dtype=torch.float64)
    )
    both, first, second = (method.refine(**batch) for method in (joint, labels_alone, weights_alone))
    assert_close(both.weights, second.weights)
    assert not torch.equal(both.weights, torch.ones(6, dtype=torch.float64))
    grads = [torch.autograd.grad(refined.loss, layer.weight, retain_graph=True)[0] for refined in (both, first)]
    assert_close(*grads)


nothing_to_learn = pytest.warns(RuntimeWarning, match="learns no example weights from this batch")


@pytest.mark.parametrize("how", HOWS)
def test_labels_of_the_same_view_teach_no_weights(generator, how):
    """At z = p every gradient of l_i is 0, and Adam would step as far along the rounding noise in its place."""
    step = make_step("conv", generator)
    joint = ImputeAndWeight(M, how=how)
    free = Method(HoldoutGradient(), ExampleWeightGradient(how=how), WeightTable(M, lr=0.1))
    for method in (joint, free):
        with nothing_to_learn:
            refined = method.refine(**step.batch(labels=None, index=torch.arange(N)))
        assert torch.equal(refined.weights, torch.ones_like(refined.weights))
    with nothing_to_learn:
        surrogate = joint.refine(**step.batch(labels=None, index=torch.arange(N))).loss
    assert float(step.of_loss(surrogate).norm()) > 0
    joint.refine(**step.batch(index=torch.arange(N)))
    assert bool((joint.weights[:N] != 1).all())


@pytest.mark.parametrize("loss", ["cross_entropy", "mse_probs", "binary_cross_entropy"])
def test_labels_that_are_made_of_the_same_logits(draw, loss):
    """As given by the loop, cast or not; a sharpened softmax, or a softmax for the loss of a sigmoid, teach weights."""
    layer = make_layer(draw)
    batch = layer.batch()
    logits, index = batch["unlabeled"].logits, torch.arange(6)
    for labels in (logits.softmax(-1), logits.float().softmax(-1).double()):
        method = ImputeAndWeight(6, inner_loss=loss)
        if loss == "binary_cross_entropy":
            method.refine(**batch, index=index, labels=labels)
        else:
            with nothing_to_learn:
                method.refine(**batch, index=index, labels=labels)
        assert bool((method.weights == 1).all()) == (loss != "binary_cross_entropy")
    method.refine(**batch, index=index, labels=(2 * logits).softmax(-1))
    assert bool((method.weights != 1).all())


def test_a_gradient_without_a_column_for_the_weights_is_refused(draw):
    layer = make_layer(draw)
    method = Method(HoldoutGradient(), LabelGradient("cross_entropy"), PullBackAndWeights(6))
    with pytest.raises(ValueError, match=r"PullBackAndWeights takes a gradient \[N, C \+ 1\] = \[6, 5\], got \[6, 4\]"):
        method.refine(**layer.batch(), index=torch.arange(6))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AlignedImputation(how="vjp"), "how must be one of"),
        (lambda: AlignedImputation(mode="test"), "mode must be one of train, eval"),
        (lambda: ImplicitImputation("V3"), "variant must be one of V1, V2"),
        (lambda: ImplicitImputation("V1", inner_loss="mse"), "inner_loss must be one of cross_entropy, mse_probs"),
        (lambda: ImplicitImputation(damping=-1.0), "damping must be >= 0"),
        (lambda: ImputeAndWeight(0), "num_examples must be >= 1"),
        (lambda: ImputeAndWeight(5, read="never"), "read must be"),
        (lambda: ImputeAndWeight(5, inner_loss="hinge"), "inner_loss must be one of"),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()
