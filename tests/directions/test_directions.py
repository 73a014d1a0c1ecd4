"""Directions: each against autograd of its definition, and nested in each other."""

import dataclasses

import pytest
import torch
from brute_force import Layer, assert_close, make_layer, reduced
from torch import Tensor
from torch.nn import functional

import fastmeta
from fastmeta.derivatives import ExampleWeightGradient, FeatureSimilarity, FiniteDifference, LabelGradient
from fastmeta.directions import DirectionRule, HoldoutGradient, InverseHessian, LookAhead, NormalizedGap, UnitLength
from fastmeta.losses import LOSSES
from fastmeta.problem import Direction, Factors, LastLayerProblem, Rows, WholeModelProblem
from fastmeta.problem.model_function import ModelFunction

biases = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])


def problem_of(layer: Layer, labels: Tensor, **options) -> LastLayerProblem:
    return LastLayerProblem(
        unlabeled=Rows(layer.features_u, layer.unlabeled.logits.detach()),
        labels=labels,
        holdout=Rows(layer.features_h, layer.holdout.logits.detach()),
        targets=layer.classes,
        has_bias=layer.bias is not None,
        **options,
    )


@pytest.fixture
def layer(draw) -> Layer:
    return make_layer(draw)


@pytest.fixture
def problem(draw, layer) -> LastLayerProblem:
    return problem_of(layer, draw.probabilities(6, 4))


def assert_same(direction: Direction | Factors, expected: tuple[Tensor, Tensor | None]) -> None:
    dense = direction.dense()
    assert_close(dense.weight, expected[0])
    assert (dense.bias is None) == (expected[1] is None)
    if dense.bias is not None and expected[1] is not None:
        assert_close(dense.bias, expected[1])


@biases
@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("loss", list(LOSSES))
def test_holdout_gradient(draw, loss, factored, bias):
    layer = make_layer(draw, bias=bias)
    expected = layer.gradient(layer.outer(layer.parameters, loss), layer.parameters)
    rule = HoldoutGradient(loss, factored=factored)
    direction = rule(problem_of(layer, draw.probabilities(6, 4)))
    assert isinstance(direction, Factors) == factored
    assert_same(direction, expected)


def test_reduction_and_bias_of_the_holdout_gradient(layer, problem):
    mean = HoldoutGradient()(problem).dense()
    assert_same(HoldoutGradient(reduction="sum")(problem), (7 * mean.weight, 7 * mean.bias))
    assert_same(HoldoutGradient(bias=False)(problem), (mean.weight, None))
    assert_same(HoldoutGradient(bias=False, factored=True)(problem), (mean.weight, None))


@biases
@pytest.mark.parametrize("labeled_weight", [0.0, 0.4])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_look_ahead_is_the_gradient_at_theta_star(draw, reduction, labeled_weight, bias):
    layer = make_layer(draw, bias=bias)
    labels, weights = draw.probabilities(6, 4), draw.uniform(6)
    options = {"rate": 0.3, "loss": "mse_probs", "reduction": reduction, "labeled_weight": labeled_weight}
    ahead = layer.inner_step(labels, weights=weights, **options)
    expected = layer.gradient(layer.outer(ahead), ahead)
    problem = problem_of(layer, labels, weights=weights)
    assert_same(LookAhead(**options)(problem), expected)
    assert_same(LookAhead(HoldoutGradient(factored=True), **options)(problem), expected)


def test_look_ahead_twice_is_not_two_steps_from_theta(layer, problem):
    """A nested look-ahead takes its own step from the parameters it is given."""
    labels = problem.labels
    once = layer.inner_step(labels, rate=0.3, loss="mse_probs")
    f_u = functional.linear(layer.features_u, *once)
    value = reduced(f_u, labels, "mse_probs")
    twice = layer.step(once, layer.gradient(value, once, create_graph=True), 0.3)
    expected = layer.gradient(layer.outer(twice), twice)
    assert_same(LookAhead(LookAhead(rate=0.3), rate=0.3)(problem), expected)


def test_look_ahead_moves_the_labeled_examples_too(draw, layer):
    """Two nested steps on C^U + C^T, with labeled examples that are not the hold-out ones."""
    labels, x_l, y_l = draw.probabilities(6, 4), draw.normal(3, 5), draw.classes(3, 4)

    def stepped(parameters):
        f_u, f_l = (functional.linear(h, *parameters) for h in (layer.features_u, x_l))
        value = reduced(f_u, labels, "mse_probs") + 0.5 * functional.cross_entropy(f_l, y_l)
        return layer.step(parameters, layer.gradient(value, parameters, create_graph=True), 0.3)

    twice = stepped(stepped(layer.parameters))
    labeled = Rows(x_l, functional.linear(x_l, *layer.parameters).detach())
    problem = problem_of(layer, labels, labeled=labeled, labeled_targets=y_l)
    inner = {"rate": 0.3, "labeled_weight": 0.5}
    assert_same(LookAhead(LookAhead(**inner), **inner)(problem), layer.gradient(layer.outer(twice), twice))


@pytest.mark.parametrize("factored", [True, False])
def test_unit_length(problem, factored):
    raw = HoldoutGradient()(problem).dense()
    direction = UnitLength(HoldoutGradient(factored=factored))(problem)
    assert isinstance(direction, Factors) == factored
    unit = direction.dense()
    length = torch.cat([raw.weight.flatten(), raw.bias]).norm()
    assert_same(unit, (raw.weight / length, raw.bias / length))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unit_length_of_zero_is_zero(problem, dtype):
    zero = Direction(torch.zeros(4, 5, dtype=dtype), torch.zeros(4, dtype=dtype))
    unit = UnitLength(lambda problem: zero)(problem).dense()
    assert torch.equal(unit.weight, zero.weight)
    assert torch.equal(unit.bias, zero.bias)


def test_inverse_hessian_undoes_the_hessian(layer, problem):
    """``(H + damping I) x`` gives back the direction, H by double backward."""
    rule = InverseHessian(HoldoutGradient(), damping=0.2, solver="cholesky")
    x = rule(problem)
    f_l, f_u = (functional.linear(h, *layer.parameters) for h in (layer.features_h, layer.features_u))
    value = functional.cross_entropy(f_l, layer.classes) + reduced(f_u, problem.labels, "cross_entropy")
    gradient = layer.gradient(value, layer.parameters, create_graph=True)
    image = torch.autograd.grad(gradient, layer.parameters, (x.weight, x.bias))
    v = HoldoutGradient()(problem).dense()
    assert_same(Direction(image[0] + 0.2 * x.weight, image[1] + 0.2 * x.bias), v)


def test_inverse_hessian_of_a_factored_direction(problem):
    dense = InverseHessian(HoldoutGradient(), damping=0.2)(problem)
    assert_same(InverseHessian(HoldoutGradient(factored=True), damping=0.2)(problem), dense)


def test_normalized_gap_resumes_bit_for_bit(draw):
    problems = [problem_of(make_layer(draw), draw.probabilities(6, 4)) for _ in range(4)]
    rule = NormalizedGap(decay=0.9, decay_norm=0.8)
    directions = [rule(problem) for problem in problems]
    again = NormalizedGap(decay=0.9, decay_norm=0.8)
    for problem in problems[:2]:
        again(problem)
    resumed = NormalizedGap(decay=0.9, decay_norm=0.8)
    resumed.load_state_dict(again.state_dict())
    for problem, direction in zip(problems[2:], directions[2:], strict=True):
        got = resumed(problem)
        assert torch.equal(got.weight, direction.weight)
        assert torch.equal(got.bias, direction.bias)


def test_normalized_gap_of_another_layer_is_refused(draw):
    rule = NormalizedGap()
    rule(problem_of(make_layer(draw), draw.probabilities(6, 4)))
    with pytest.raises(
        ValueError, match=r"averages of \[\[4, 5\], \[4\]\] do not fit gradients of \[\[4, 3\], \[4\]\]"
    ):
        rule(problem_of(make_layer(draw, (6, 3, 4)), draw.probabilities(6, 4)))


def test_normalized_gap_of_one_layer_is_that_of_the_model(draw, layer, problem):
    """Both levels give one direction where only the last layer moves."""
    model = torch.nn.Linear(5, 4).double()
    model.weight.data, model.bias.data = layer.weight.detach(), layer.bias.detach()
    whole = WholeModelProblem(ModelFunction(model), layer.features_u, problem.labels, layer.features_h, layer.classes)
    rules = [NormalizedGap(decay=0.9, decay_norm=0.8) for _ in range(2)]
    for _ in range(2):
        direction, named = rules[0](problem), rules[1](whole)
    assert_same(direction, (named["weight"], named["bias"]))


COUNTED = {
    "label gradient": lambda: LabelGradient("cross_entropy", rate=0.3),
    "label gradient that reads the labels": lambda: LabelGradient("mse_tanh", rate=0.3),
    "feature similarity": lambda: FeatureSimilarity(rate=0.3, reduction="mean"),
    "finite difference": lambda: FiniteDifference(rate=0.3),
    "example weights": lambda: ExampleWeightGradient(rate=0.3, reduction="mean"),
}


@pytest.mark.parametrize("name", COUNTED)
def test_examples_counted_on_a_device_are_not_waited_for(monkeypatch, problem, name):
    """Over the processes of a group their number is a tensor there: 1 / B is applied and never read."""
    problem = dataclasses.replace(problem, targets=torch.eye(4, dtype=torch.float64)[problem.targets])
    rules = LookAhead(HoldoutGradient(factored=True), rate=0.2, labeled_weight=0.5), COUNTED[name]()
    expected = rules[1](problem, rules[0](problem))

    def refuse(tensor: Tensor) -> float:
        raise AssertionError("the host waits")

    counted = "fastmeta.problem.base.joined_count"
    monkeypatch.setattr(counted, lambda count, group, device: torch.tensor(count, dtype=torch.int64))
    for reads in ("__float__", "__int__", "__bool__", "item", "tolist"):
        monkeypatch.setattr(Tensor, reads, refuse)
    with fastmeta.use_impl("reference"):
        got = rules[1](problem, rules[0](problem))
    monkeypatch.undo()
    assert_close(got, expected)


NESTED: list[DirectionRule] = [
    UnitLength(LookAhead(HoldoutGradient(), rate=0.1)),
    LookAhead(UnitLength(InverseHessian(HoldoutGradient())), rate=0.1),
    InverseHessian(LookAhead(HoldoutGradient(factored=True), rate=0.1)),
    UnitLength(NormalizedGap()),
]


@pytest.mark.parametrize("rule", NESTED)
def test_rules_nest(problem, rule):
    direction = rule(problem).dense()
    assert direction.weight.shape == (4, 5)
    assert bool(direction.weight.isfinite().all())
