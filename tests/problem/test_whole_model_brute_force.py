"""The yardstick itself, against numerical differences of plain training with torch.optim.SGD on a copy of the model."""

import copy
import dataclasses

import pytest
import torch
from cases import Draw
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from whole_model_brute_force import (
    INNER_LOSSES,
    Bilevel,
    brute_force_alignment_gradient,
    brute_force_directional,
    brute_force_directions,
    brute_force_influence,
    brute_force_label_gradient,
    brute_force_weight_gradient,
    dense_hessian,
    flatten,
    forward,
    loss_gradient,
    losses_of,
    numerical_directional,
    reduced_loss,
    richardson,
    trainable,
)
from whole_model_nets import NETS, Inputs, net_cases

modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
nets = pytest.mark.parametrize("name", list(NETS))


def problem_of(draw: Draw, name: str, training: bool = True, count: int = 4, **options) -> Bilevel:
    model, make_inputs = NETS[name](draw.generator)
    defaults = {
        "weights": draw.uniform(count) + 0.5,
        "mask": draw.uniform(count) + 0.5,
        "labeled": make_inputs(2),
        "labeled_targets": draw.probabilities(2, 3),
        "labeled_weight": 0.7,
        "rate": 0.3,
    }
    return Bilevel(
        model.train(training),
        make_inputs(count),
        draw.probabilities(count, 3),
        make_inputs(3),
        draw.classes(3, 3),
        **(defaults | options),
    )


def call(model: nn.Module, inputs: Inputs) -> Tensor:
    """The module itself, from the random state that every forward of the yardstick starts from."""
    with torch.random.fork_rng(devices=[]):
        if isinstance(inputs, dict):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def train(problem: Bilevel, labels: Tensor, weights: Tensor) -> nn.Module:
    """K steps of torch.optim.SGD on a copy of the model."""
    model = copy.deepcopy(problem.model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=problem.rate, momentum=problem.momentum)
    for _ in range(problem.steps):
        values = weights * problem.mask * losses_of(call(model, problem.unlabeled), labels, problem.loss)
        labeled = losses_of(call(model, problem.labeled), problem.labeled_targets, problem.labeled_loss)
        parts = (values.mean(), labeled.mean()) if problem.reduction == "mean" else (values.sum(), labeled.sum())
        optimizer.zero_grad()
        (parts[0] + problem.labeled_weight * parts[1]).backward()
        optimizer.step()
    return model


def outer_after_training(problem: Bilevel, labels: Tensor, weights: Tensor) -> Tensor:
    model = train(problem, labels, weights)
    with torch.no_grad():
        return losses_of(call(model, problem.holdout), problem.targets, problem.outer_loss).mean()


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    assert float((actual - expected).norm()) <= tolerance * float(expected.norm()) + 1e-14


@nets
@modes
@pytest.mark.parametrize(("steps", "momentum"), [(1, 0.0), (2, 0.0), (3, 0.8)])
def test_label_and_weight_gradients_are_those_of_training(draw, name, training, steps, momentum):
    # A difference can cross the kinks of huber's derivative, where it is no yardstick.
    loss = draw.choice([loss for loss in INNER_LOSSES if loss != "huber"])
    reduction = draw.choice(("mean", "sum"))
    rate = 0.03 if reduction == "mean" else 0.006  # of training that does not diverge: differences mean something
    problem = problem_of(
        draw, name, training, steps=steps, momentum=momentum, loss=loss, reduction=reduction, rate=rate
    )
    labels, weights = problem.labels, problem.weights
    row, column = draw.integer(0, 4), draw.integer(0, 3)
    entry = torch.zeros_like(labels)
    entry[row, column] = 1.0
    # One entry, and all of them at once.
    by_labels = brute_force_label_gradient(problem)
    for step in (entry, functional.normalize(draw.normal(4, 3), dim=(0, 1))):
        numeric = richardson(lambda t, v=step: outer_after_training(problem, labels + t * v, weights))
        assert abs(float((by_labels * step).sum() - numeric)) <= 1e-7 * float(by_labels.norm()), (loss, reduction)
    by_weights = brute_force_weight_gradient(problem)
    for step in (torch.eye(4, dtype=torch.float64)[row], functional.normalize(draw.normal(4), dim=0)):
        numeric = richardson(lambda t, v=step: outer_after_training(problem, labels, weights + t * v))
        assert abs(float(by_weights @ step - numeric)) <= 1e-7 * float(by_weights.norm()), (loss, reduction)


@settings(max_examples=20, deadline=None)
@given(case=net_cases(), loss=st.sampled_from(INNER_LOSSES))
def test_any_shape(case, loss):
    """Sizes down to 1: the label gradient along a direction is the label tangent along the hold-out one."""
    draw = Draw(case.generator)
    labels = draw.probabilities(len(forward(case.model, case.inputs)), case.classes)
    targets = draw.classes(len(forward(case.model, case.holdout)), case.classes)
    problem = Bilevel(case.model, case.inputs, labels, case.holdout, targets, loss=loss, rate=0.3)

    def pull(logits: Tensor) -> Tensor:
        z = labels.clone().requires_grad_()
        return -torch.autograd.grad(losses_of(logits, z, loss).sum(), z, create_graph=True)[0]

    (direction,) = brute_force_directions(problem)
    tangent = brute_force_directional(case.model, case.inputs, direction, pull)
    assert_close(brute_force_label_gradient(problem), 0.3 / len(labels) * tangent, 1e-10)


@nets
@modes
def test_directional_derivative(draw, name, training):
    problem = problem_of(draw, name, training)
    direction = {n: draw.normal(*p.shape) for n, p in trainable(problem.model).items()}
    if training:
        del direction["fc.weight"]  # does not move
    for function in (
        lambda f: f,
        lambda f: f.log_softmax(-1),
        lambda f: losses_of(f, problem.labels, "mse_probs"),
        lambda f: reduced_loss(f, problem.labels, "cross_entropy"),
    ):
        exact = brute_force_directional(problem.model, problem.unlabeled, direction, function)
        numeric = numerical_directional(problem.model, problem.unlabeled, direction, function)
        assert_close(numeric, exact, 1e-8)


def test_batch_statistics_are_part_of_the_derivative(draw):
    """In train mode an example's output moves with its neighbors' inputs; in eval mode it does not."""
    problem = problem_of(draw, "conv")
    model, images = problem.model, problem.unlabeled
    direction = {n: draw.normal(*p.shape) for n, p in trainable(model).items()}
    alone = brute_force_directional(model, images[:2], direction, lambda f: f)
    assert (brute_force_directional(model, images, direction, lambda f: f)[:2] - alone).norm() > 1e-3 * alone.norm()
    for module in model.modules():  # the mask of a smaller batch is another one
        module.p = 0.0
    model.eval()
    alone = brute_force_directional(model, images[:2], direction, lambda f: f)
    assert_close(brute_force_directional(model, images, direction, lambda f: f)[:2], alone, 1e-12)


@nets
def test_nothing_of_the_model_or_of_the_random_state_changes(draw, name):
    problem = problem_of(draw, name)
    state = {n: t.clone() for n, t in problem.model.state_dict().items()}
    random = torch.get_rng_state()
    first = brute_force_label_gradient(problem)
    assert torch.equal(first, brute_force_label_gradient(problem))
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(t, state[n]) for n, t in problem.model.state_dict().items())
    assert all(p.grad is None for p in problem.model.parameters())
    torch.rand(1)  # another random state, another mask
    assert torch.equal(first, brute_force_label_gradient(problem)) == (name in ("tied", "mlp"))


def test_directions_are_the_adjoint_recursion(draw):
    """``v_{k-1} = v_k - rate H_k v_k``, down from the hold-out gradient, with the dense Hessian at theta_k."""
    problem = problem_of(draw, "mlp", steps=3)
    points = problem.trajectory()
    expected = flatten(loss_gradient(problem.model, problem.holdout, problem.targets, parameters=points[3]))
    directions = brute_force_directions(problem)
    for k in (2, 1, 0):
        assert_close(flatten(directions[k]), expected, 1e-11)
        model = copy.deepcopy(problem.model)
        model.load_state_dict(points[k])
        hessian = dense_hessian(dataclasses.replace(problem, model=model))
        expected = expected - problem.rate * hessian @ expected


@nets
def test_dense_hessian_and_influence_weights(draw, name):
    """Influence is how the hold-out loss moves with the minimizer of the damped, linearized inner problem."""
    problem = problem_of(draw, name)
    names = ("fc.bias", next(iter(trainable(problem.model))))
    theta = trainable(problem.model)
    hessian = dense_hessian(problem, names)
    v = {n: 0.2 * draw.normal(*theta[n].shape) for n in names}

    def gradient(t: float) -> Tensor:
        moved = {n: theta[n] + t * v[n] if n in v else p for n, p in theta.items()}
        moved = {n: p.clone().requires_grad_() for n, p in moved.items()}
        grads = torch.autograd.grad(problem.inner_loss(moved), [moved[n] for n in names])
        return torch.cat([g.flatten() for g in grads])

    assert_close(hessian @ flatten(v), richardson(gradient), 1e-7)
    g_val = flatten(loss_gradient(problem.model, problem.holdout, problem.targets), names)
    adjoint = torch.linalg.inv(hessian + 2.0 * torch.eye(len(hessian), dtype=torch.float64)) @ g_val
    expected = []
    for i in range(4):
        only = torch.eye(4, dtype=torch.float64)[i] * problem.mask
        grads = loss_gradient(
            problem.model, problem.unlabeled, problem.labels, problem.loss, weights=only, reduction="sum"
        )
        expected.append(-(flatten(grads, names) @ adjoint))
    assert_close(brute_force_influence(problem, 2.0, names), torch.stack(expected), 1e-10)


@nets
@modes
def test_alignment_gradient(draw, name, training):
    problem = problem_of(draw, name, training)
    theta = trainable(problem.model)
    averages = {n: draw.normal(*p.shape) for n, p in theta.items()}
    fourth = {n: draw.uniform(*p.shape) for n, p in theta.items()}
    w = draw.normal(4, 3)

    def objective(t: float) -> Tensor:
        y = (w + t * step).softmax(-1)
        g_u = loss_gradient(problem.model, problem.unlabeled, y, "cross_entropy", weights=problem.weights)
        scale = flatten(fourth).sqrt() + 1e-2
        return ((flatten(averages) - flatten(g_u)).square() / scale).sum()

    gradient = brute_force_alignment_gradient(
        problem.model, problem.unlabeled, w, averages, fourth, epsilon=1e-2, weights=problem.weights
    )
    step = draw.normal(4, 3)
    assert abs(float((gradient * step).sum() - richardson(objective))) <= 1e-7 * float(gradient.norm())
