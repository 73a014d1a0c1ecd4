"""Look-ahead directions: label and weight gradients through K inner steps equal those of plain autograd."""

import dataclasses
from typing import Any

import pytest
import torch
from brute_force import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor, nn
from whole_model_brute_force import (
    INNER_LOSSES,
    Bilevel,
    brute_force_directions,
    brute_force_label_gradient,
    brute_force_weight_gradient,
)
from whole_model_nets import NETS, NetCase, batch_size, mlp, net_cases, normal

from fastmeta.derivatives import ExampleWeightGradient, LabelGradient
from fastmeta.directions import HoldoutGradient, InverseHessian, LookAhead, UnitLength
from fastmeta.losses import LOSSES
from fastmeta.problem import Direction, LastLayerProblem, Rows, Trajectory, WholeModelProblem, vectors
from fastmeta.problem.model_function import ModelFunction

RATE = 0.01  # five steps on a sum, with momentum, must not diverge for any draw
MODELS = [(net, mode) for net in NETS for mode in ("train", "eval") if net in ("conv", "text") or mode == "train"]
# Every number of steps, with and without momentum, C^T, and both reductions.
INNER: list[dict[str, Any]] = [
    {"steps": 1, "momentum": 0.9, "labeled_weight": 0.6, "reduction": "mean"},
    {"steps": 2, "momentum": 0.0, "labeled_weight": 0.0, "reduction": "mean"},
    {"steps": 2, "momentum": 0.9, "labeled_weight": 0.6, "reduction": "sum"},
    {"steps": 5, "momentum": 0.0, "labeled_weight": 0.6, "reduction": "mean"},
    {"steps": 5, "momentum": 0.9, "labeled_weight": 0.0, "reduction": "sum"},
]


def uniform(generator: Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def examples(generator: Generator, classes: int, count: int, holdout: int) -> dict[str, Tensor]:
    """Labels (of a cross-entropy they need not sum to one), weights, a mask with a zero, and hold-out classes."""
    return {
        "labels": uniform(generator, count, classes),
        "weights": uniform(generator, count) + 0.1,
        "mask": (torch.arange(count) != 1).double(),
        "targets": torch.randint(classes, (holdout,), generator=generator),
    }


def net_and_problem(net: str, mode: str, generator: Generator) -> tuple[Bilevel, WholeModelProblem]:
    """One batch: as the brute force takes it, and as fastmeta does."""
    model, make_inputs = NETS[net](generator)
    model.train(mode == "train")
    inputs = {"unlabeled": make_inputs(4), "holdout": make_inputs(3)}
    return both(model, {**inputs, **examples(generator, 3, 4, 3)})


def both(model: nn.Module, batch: dict[str, Any]) -> tuple[Bilevel, WholeModelProblem]:
    batch = dict(batch)
    brute = Bilevel(model, **batch)
    labels = batch.pop("labels")
    return brute, WholeModelProblem(ModelFunction(model), impute=labels, **batch)


def look_ahead(brute: Bilevel, **options: Any) -> LookAhead:
    names = ("loss", "reduction", "labeled_weight", "labeled_loss", "rate", "steps", "momentum")
    return LookAhead(**{name: getattr(brute, name) for name in names}, **options)


@pytest.mark.parametrize("loss", INNER_LOSSES)
@pytest.mark.parametrize(("net", "mode"), MODELS)
def test_label_gradient_through_inner_steps(generator, net, mode, loss):
    brute, problem = net_and_problem(net, mode, generator)
    for inner in INNER:
        brute = dataclasses.replace(brute, loss=loss, rate=RATE, **inner)
        expected = brute_force_label_gradient(brute)
        direction = look_ahead(brute)(problem)
        for how in ("jvp", "double_backward"):
            derivative = LabelGradient(loss, rate=RATE, reduction=brute.reduction, how=how)
            assert_close(derivative(problem, direction), expected)


@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize(("net", "mode"), MODELS)
def test_weight_gradient_through_inner_steps(generator, net, mode, loss):
    brute, problem = net_and_problem(net, mode, generator)
    brute = dataclasses.replace(brute, loss=loss, rate=RATE, steps=3, momentum=0.5)
    expected = brute_force_weight_gradient(brute)
    direction = look_ahead(brute)(problem)
    for how in ("jvp", "double_backward"):
        derivative = ExampleWeightGradient(loss, rate=RATE, reduction="mean", how=how)
        assert_close(derivative(problem, direction), expected)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("net", NETS)
def test_directions_of_the_steps(generator, net, momentum):
    """Labeled examples that are not the hold-out ones, and their own loss."""
    model, make_inputs = NETS[net](generator)
    batch = {"unlabeled": make_inputs(4), "holdout": make_inputs(3), "labeled": make_inputs(2)}
    batch |= {**examples(generator, 3, 4, 3), "labeled_targets": uniform(generator, 2, 3)}
    brute, problem = both(model, batch)
    brute = dataclasses.replace(
        brute, rate=RATE, steps=3, momentum=momentum, labeled_weight=0.7, labeled_loss="mse", outer_loss="mse_probs"
    )
    trajectory = look_ahead(brute, of=HoldoutGradient("mse_probs"))(problem)
    assert isinstance(trajectory, Trajectory)
    expected = brute_force_directions(brute)
    for (_, direction), step in zip(trajectory.steps, expected, strict=True):
        assert isinstance(direction, dict)
        assert_close(vectors.flat(direction), vectors.flat(step))


@settings(max_examples=15, deadline=None)
@given(
    case=net_cases(),
    loss=st.sampled_from(INNER_LOSSES),
    steps=st.integers(1, 3),
    momentum=st.sampled_from([0.0, 0.3, 0.9]),
    labeled_weight=st.sampled_from([0.0, 0.5]),
)
def test_any_shape(case: NetCase, loss: str, steps: int, momentum: float, labeled_weight: float):
    counts = batch_size(case.inputs), batch_size(case.holdout)
    batch = {"unlabeled": case.inputs, "holdout": case.holdout}
    brute, problem = both(case.model, batch | examples(case.generator, case.classes, *counts))
    brute = dataclasses.replace(
        brute, loss=loss, rate=0.01, steps=steps, momentum=momentum, labeled_weight=labeled_weight
    )
    got = LabelGradient(loss, rate=0.01, how="jvp")(problem, look_ahead(brute)(problem))
    expected = brute_force_label_gradient(brute)
    assert float((got - expected).norm()) <= 1e-9 * float(expected.norm()) + 1e-13


@pytest.mark.parametrize("loss", INNER_LOSSES)
@pytest.mark.parametrize(("net", "mode"), MODELS)
def test_last_layer_in_closed_form_is_the_model_with_the_others_frozen(generator, net, mode, loss):
    brute, problem = net_and_problem(net, mode, generator)
    model = brute.model.requires_grad_(False)
    model.fc.requires_grad_(True)
    function = ModelFunction(model)
    seen = [function.outputs(inputs) for inputs in (brute.unlabeled, brute.holdout)]
    rows_u, rows_h = (Rows(outputs.features.detach(), outputs.logits.detach()) for outputs in seen)
    last_layer = LastLayerProblem(rows_u, brute.labels, rows_h, brute.targets, brute.weights, brute.mask)
    problem = dataclasses.replace(problem, function=function, parameters={})
    for inner in INNER:
        brute = dataclasses.replace(brute, loss=loss, rate=RATE, **inner)
        expected = brute_force_label_gradient(brute)
        derivative = LabelGradient(loss, rate=RATE, reduction=brute.reduction)
        rule = look_ahead(brute)
        assert_close(derivative(last_layer, rule(last_layer)), expected)
        assert_close(dataclasses.replace(derivative, how="jvp")(problem, rule(problem)), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_last_layer_directions_are_those_of_the_model(generator, bias):
    brute, problem = net_and_problem("mlp", "train", generator)
    model = brute.model.requires_grad_(False)
    model.fc.weight.requires_grad_(True)
    if bias:
        model.fc.bias.requires_grad_(True)
    function = ModelFunction(model)
    seen = [function.outputs(inputs) for inputs in (brute.unlabeled, brute.holdout)]
    rows_u, rows_h = (Rows(outputs.features.detach(), outputs.logits.detach()) for outputs in seen)
    last_layer = LastLayerProblem(rows_u, brute.labels, rows_h, brute.targets, has_bias=bias)
    rule = LookAhead(rate=0.3, steps=3, momentum=0.5, labeled_weight=0.5)
    whole = rule(dataclasses.replace(problem, function=function, parameters={}, weights=None, mask=None))
    for (_, direction), (_, expected) in zip(rule(last_layer).steps, whole.steps, strict=True):
        assert isinstance(direction, Direction)
        assert_close(direction.weight, expected["fc.weight"])
        assert (direction.bias is None) == (not bias)
        if bias:
            assert_close(direction.bias, expected["fc.bias"])


def test_a_direction_of_some_layers_spreads_to_all(generator):
    """The rule inside moves the last layer alone; the Hessian of a step brings the others in."""
    _, problem = net_and_problem("mlp", "train", generator)
    trajectory = LookAhead(InverseHessian(layers=("fc",)), rate=RATE, steps=2)(problem)
    first, last = (direction for _, direction in trajectory.steps)
    assert set(last) == {"fc.weight", "fc.bias"}
    assert set(first) == set(problem.parameters)
    v = {name: last.get(name, torch.zeros_like(value)) for name, value in problem.parameters.items()}
    product = trajectory.steps[1][0].hessian_vector_product(LookAhead().inner, v)
    assert_close(vectors.flat(first), vectors.flat({name: v[name] - RATE * product[name] for name in first}))


class GraphMemory:
    """Bytes that graphs of autograd keep for the backward pass, now and at most."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def saved(self) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Saved(tensor, self), lambda saved: saved.tensor)


class _Saved:
    def __init__(self, tensor: Tensor, memory: GraphMemory) -> None:
        self.tensor, self.memory = tensor, memory
        memory.now += tensor.nbytes
        memory.most = max(memory.most, memory.now)

    def __del__(self) -> None:
        self.memory.now -= self.tensor.nbytes


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_memory_does_not_grow_with_the_graph_of_the_steps(generator, momentum):
    _, problem = net_and_problem("conv", "train", generator)
    most = {}
    for steps in (1, 2, 5):
        memory = GraphMemory()
        with memory.saved():
            trajectory = LookAhead(rate=RATE, steps=steps, momentum=momentum, labeled_weight=0.5)(problem)
        assert memory.now == 0  # no graph is left
        most[steps] = memory.most
        if isinstance(trajectory, Trajectory):
            kept = [tensor for point, direction in trajectory.steps for tensor in point.parameters.values()]
            storages = {tensor.untyped_storage().data_ptr() for tensor in kept}
            assert len(storages) == steps * len(problem.parameters)  # K copies of the parameters, one of them theta's
    assert most[2] == most[5]
    assert most[1] < most[2]  # the graph of a gradient beside that of one Hessian-vector product


def test_inner_steps_leave_the_model_as_it_was(generator):
    brute, problem = net_and_problem("conv", "train", generator)
    before = {name: value.clone() for name, value in brute.model.state_dict().items()}
    random = torch.get_rng_state()
    LookAhead(rate=RATE, steps=3)(problem)
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in brute.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in brute.model.parameters())


NO_TRAJECTORY = [UnitLength(LookAhead(steps=2)), InverseHessian(LookAhead(steps=2)), LookAhead(LookAhead(steps=2))]


@pytest.mark.parametrize("rule", NO_TRAJECTORY)
def test_several_steps_inside_another_rule_are_refused(generator, rule):
    _, problem = net_and_problem("mlp", "train", generator)
    with pytest.raises(TypeError, match="of must give one direction, got those of several inner steps"):
        rule(problem)


def test_bad_settings():
    for options, message in (
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"momentum": -0.1}, "momentum must be >= 0.0, got -0.1"),
        ({"loss": "hinge"}, "loss must be one of"),
        ({"labeled_loss": "hinge"}, "labeled_loss must be one of"),
        ({"rate": float("inf")}, "rate must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            LookAhead(**options)


def test_directions_of_the_other_level_are_refused(generator):
    model, make_inputs = mlp(generator)
    z, y = normal(generator, 2, 3), torch.zeros(2, dtype=torch.int64)
    problem = WholeModelProblem(ModelFunction(model), make_inputs(2), z, make_inputs(2), y)
    with pytest.raises(TypeError, match="direction must be a whole model's dict by parameter name, got Direction"):
        problem.moved(Direction(torch.zeros(3, 6), None), 0.1)
    rows = Rows(normal(generator, 2, 6), z)
    with pytest.raises(TypeError, match="direction must be a last layer's Direction or Factors"):
        LastLayerProblem(rows, z, rows, y).moved({"fc.weight": torch.zeros(3, 6)}, 0.1)
