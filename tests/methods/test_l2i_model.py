"""Learning to Impute where the whole model moves: every variant against inner steps that autograd goes back through."""

import copy

import pytest
import torch
from cases import Draw
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from whole_model_brute_force import (
    INNER_LOSSES,
    Bilevel,
    brute_force_label_gradient,
    forward,
    reduced_loss,
)
from whole_model_nets import NETS, net_cases

from fastmeta import L2I
from fastmeta.losses import LOSSES

RATE = 0.3
EXACT = ("jvp", "double_backward")
nets = pytest.mark.parametrize("name", list(NETS))
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def published(variant: str = "V2", **options) -> L2I:
    return L2I(
        variant, **{"how": "jvp", "rate": RATE, "look_ahead": True, "unit_length": False, "weight": 1.0, **options}
    )


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    assert actual.shape == expected.shape
    assert float((actual - expected).norm()) <= tolerance * float(expected.norm()) + 1e-14


def own(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(loss: Tensor, model: nn.Module) -> Tensor:
    grads = torch.autograd.grad(loss, list(own(model).values()), materialize_grads=True)
    return torch.cat([g.flatten() for g in grads])


def arguments(problem: Bilevel) -> dict:
    return {
        "model": problem.model,
        "unlabeled": problem.unlabeled,
        "holdout": problem.holdout,
        "targets": problem.targets,
        "mask": problem.mask,
        "labeled": problem.labeled,
        "labeled_targets": problem.labeled_targets,
    }


def label_gradient(method: L2I, problem: Bilevel) -> Tensor:
    """dG/dz is what V2's surrogate has for a gradient with respect to labels that are given."""
    z = problem.labels.clone().requires_grad_()
    return torch.autograd.grad(method.refine(**arguments(problem), labels=z).loss, z)[0]


def make_problem(draw: Draw, name: str, training: bool = True, **options) -> Bilevel:
    model, make_inputs = NETS[name](draw.generator)
    model.train(training)
    labels = draw.probabilities(4, 3)
    return Bilevel(model, make_inputs(4), labels, make_inputs(3), draw.classes(3, 3), rate=RATE, **options)


@settings(max_examples=60, deadline=None)
@given(
    case=net_cases(),
    how=st.sampled_from(EXACT),
    steps=st.sampled_from((1, 1, 2, 5)),
    momentum=st.sampled_from((0.0, 0.8)),
    inner_loss=st.sampled_from(INNER_LOSSES),
    outer_loss=st.sampled_from(list(LOSSES)),
    reduction=st.sampled_from(("mean", "sum")),
    labeled_weight=st.sampled_from((0.0, 0.7)),
    separate=st.booleans(),
    masked=st.booleans(),
)
def test_label_gradient_of_any_net(
    case, how, steps, momentum, inner_loss, outer_loss, reduction, labeled_weight, separate, masked
):
    """K inner steps of any net and shape, C^T on the hold-out examples or on others, every loss."""
    draw = Draw(case.generator)
    count, classes = len(forward(case.model, case.inputs)), case.classes
    held = len(forward(case.model, case.holdout))
    labels = draw.probabilities(count, classes)
    problem = Bilevel(
        case.model,
        case.inputs,
        labels,
        case.holdout,
        draw.classes(held, classes),
        mask=draw.uniform(count) + 0.1 if masked else None,
        labeled=case.inputs if separate else None,
        labeled_targets=draw.classes(count, classes) if separate else None,
        loss=inner_loss,
        labeled_loss=outer_loss,
        outer_loss=outer_loss,
        reduction=reduction,
        labeled_weight=labeled_weight,
        rate=0.05,
        steps=steps,
        momentum=momentum,
    )
    method = published(
        how=how,
        inner_loss=inner_loss,
        outer_loss=outer_loss,
        reduction=reduction,
        labeled_weight=labeled_weight,
        rate=0.05,
        steps=steps,
        momentum=momentum,
    )
    assert_close(label_gradient(method, problem), brute_force_label_gradient(problem))


@nets
@modes
@pytest.mark.parametrize("how", EXACT)
def test_v2_is_the_gradient_through_the_imputer_alone(draw, name, training, how):
    """``dC^H(theta*(z(theta))) / dtheta`` where theta acts through the labels: Eq. (V2), in every parameter."""
    steps = draw.choice((1, 2))
    problem = make_problem(draw, name, training, steps=steps, labeled_weight=0.5)
    refined = published(how=how, steps=steps, labeled_weight=0.5).refine(**arguments(problem))
    z = forward(problem.model, problem.unlabeled, own(problem.model)).softmax(-1)
    assert_close(refined.labels, z.detach(), 1e-12)
    expected = gradients(problem.outer(problem.trajectory(z)[-1]), problem.model)
    assert_close(gradients(refined.loss, problem.model), expected)


def test_lambda_of_the_papers(draw):
    """``C^T + lambda C^U`` at eta is ``rate = lambda eta``, ``labeled_weight = 1 / lambda``."""
    problem, lam, eta = make_problem(draw, "mlp"), 4.0, 0.2
    theta = own(problem.model)
    z = problem.labels.clone().requires_grad_()
    unlabeled = reduced_loss(forward(problem.model, problem.unlabeled, theta), z, "mse_probs")
    labeled = reduced_loss(forward(problem.model, problem.holdout, theta), problem.targets, "cross_entropy")
    grads = torch.autograd.grad(labeled + lam * unlabeled, list(theta.values()), create_graph=True)
    ahead = {n: p.detach() - eta * g for (n, p), g in zip(theta.items(), grads, strict=True)}
    expected = torch.autograd.grad(problem.outer(ahead), z)[0]
    assert_close(label_gradient(published(rate=lam * eta, labeled_weight=1 / lam), problem), expected)


class Teacher:
    """``theta' <- decay theta' + (1 - decay) theta``: an average of the student, as a function of its parameters."""

    def __init__(self, student: nn.Module, draw: Draw, decay: float = 0.9) -> None:
        self.model = copy.deepcopy(student)
        self.decay = decay
        self.before = {name: p.detach() + 0.1 * draw.normal(*p.shape) for name, p in own(student).items()}

    def __call__(self, student: nn.Module, inputs: Tensor) -> Tensor:
        average = {n: self.decay * self.before[n] + (1 - self.decay) * p for n, p in own(student).items()}
        return functional_call(self.model, average, (inputs,)).softmax(-1)


@pytest.mark.parametrize("imputer", ["student", "another view", "sharpened", "teacher of its own", "teacher"])
def test_any_imputer(draw, imputer):
    """V2 pulls the gradient back through whatever made the labels; a teacher that is an average reaches the student."""
    problem = make_problem(draw, "mlp")
    model, x = problem.model, problem.unlabeled
    view, teacher = x + 0.1 * draw.normal(*x.shape), Teacher(problem.model, draw)
    separate = NETS["mlp"](draw.generator).model  # with parameters that are trained for themselves
    imputers = {
        "student": (lambda: None, lambda: forward(model, x, own(model)).softmax(-1), model),
        "another view": (lambda: model(view).softmax(-1), None, model),
        "sharpened": (lambda: (2 * model(x)).softmax(-1), None, model),
        "teacher of its own": (lambda: separate(x).softmax(-1), None, separate),
        "teacher": (lambda: teacher(model, x), None, model),
    }
    given, reference, learns = imputers[imputer]
    refined = published().refine(**arguments(problem), labels=given())
    z = (reference or given)()
    expected = gradients(problem.outer(problem.trajectory(z)[-1]), learns)
    assert float(expected.norm()) > 0
    assert_close(gradients(refined.loss, learns), expected)
    assert_close(refined.labels, z.detach(), 1e-12)


@pytest.mark.parametrize("how", EXACT)
def test_v2_under_no_grad(draw, how):
    """Where loops make their pseudo-labels; the surrogate is on the graph all the same."""
    problem = make_problem(draw, "conv", training=False)
    outside = published(how=how).refine(**arguments(problem)).loss
    with torch.no_grad():
        inside = published(how=how).refine(**arguments(problem)).loss
    assert torch.equal(gradients(inside, problem.model), gradients(outside, problem.model))


@nets
def test_v1_steps_on_labels_and_on_their_logits(draw, name):
    problem = make_problem(draw, name)
    z = problem.labels
    gradient = brute_force_label_gradient(problem)
    step = 2 / float(gradient.max())
    on_labels = published("V1", label_space="probabilities", project=False, label_step=step)
    refined = on_labels.refine(**arguments(problem), labels=z)
    assert_close(refined.labels, z - step * gradient)
    assert refined.loss.item() == 0
    on_logits = published("V1", label_space="logits", label_step=step).refine(**arguments(problem), labels=z)
    dq = z * (gradient - (z * gradient).sum(-1, keepdim=True))
    assert_close(on_logits.labels, (z.log() - step * dq).softmax(-1))


@pytest.mark.parametrize("inner_loss", ["mse", "mse_tanh"])
def test_regression(draw, inner_loss):
    """Landmarks: z are the outputs themselves; ``dC^H/dz = (2 eta / n) (1 - tanh^2 z) D_v tanh y_u`` for the tanh."""
    problem = make_problem(draw, "conv", loss=inner_loss, outer_loss="mse")
    options = {"inner_loss": inner_loss, "outer_loss": "mse"}
    batch = arguments(problem) | {"targets": draw.normal(3, 3)}
    problem = Bilevel(**{**vars(problem), "targets": batch["targets"]})
    v1 = published("V1", label_space="probabilities", project=False, label_step=5.0, **options)
    z = forward(problem.model, problem.unlabeled).detach()
    at_z = Bilevel(**{**vars(problem), "labels": z})
    assert_close(v1.refine(**batch).labels, z - 5.0 * brute_force_label_gradient(at_z))
    z = forward(problem.model, problem.unlabeled, own(problem.model))
    expected = gradients(problem.outer(problem.trajectory(z)[-1]), problem.model)
    assert_close(gradients(published(**options).refine(**batch).loss, problem.model), expected)


@pytest.mark.parametrize(("how", "order"), [("finite_difference", 2), ("forward_difference", 1)])
def test_differences_converge_to_the_derivative(draw, how, order):
    problem = make_problem(draw, "conv")
    exact = brute_force_label_gradient(problem)
    errors = [
        float((label_gradient(published(how=how, radius=radius), problem) - exact).norm()) for radius in (4e-3, 2e-3)
    ]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.1)


def count_passes(model: nn.Module, refine) -> int:
    calls = []
    handle = model.register_forward_hook(lambda *call: calls.append(None))
    refine()
    handle.remove()
    return len(calls)


@pytest.mark.parametrize("variant", ["V1", "V2"])
@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({"look_ahead": False}, 2),  # hold-out; unlabeled in forward mode
        ({}, 3),  # unlabeled for theta*, hold-out at theta*, unlabeled in forward mode along what it gave
        ({"labeled_weight": 1.0}, 4),  # labeled for theta*
        ({"look_ahead": False, "how": "forward_difference"}, 3),  # hold-out; unlabeled at theta and at one probe
        ({"how": "forward_difference"}, 4),
        ({"how": "finite_difference"}, 4),  # unlabeled for theta*, hold-out at theta*, two probes
    ],
)
def test_no_pass_is_run_twice(draw, variant, options, passes):
    """Imputed labels come out of a pass that is made anyway, those on the graph too."""
    problem = make_problem(draw, "conv")
    method = published(variant, **options)
    assert count_passes(problem.model, lambda: method.refine(**arguments(problem))) == passes


@pytest.mark.parametrize("how", [*EXACT, "finite_difference", "forward_difference"])
@pytest.mark.parametrize("name", ["conv", "text"])
def test_the_model_is_left_as_it_was(draw, name, how):
    problem = make_problem(draw, name)
    model = problem.model
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    random = torch.get_rng_state()
    refined = published(how=how, steps=2).refine(**arguments(problem))
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert all(bool((p.grad == 1).all()) for p in model.parameters())
    assert model.training
    refined.loss.backward()
    assert not bool((model.fc.weight.grad == 1).all())


def test_v2_needs_labels_on_the_graph(draw):
    problem = make_problem(draw, "mlp")
    with pytest.raises(ValueError, match=r"labels must be on the graph, got .* torch\.no_grad.*L2I\('V1'\)"):
        published().refine(**arguments(problem), labels=problem.labels)
    assert published("V1").refine(**arguments(problem), labels=problem.labels).labels.shape == (4, 3)


def test_a_model_is_needed(draw):
    problem = make_problem(draw, "mlp")
    with pytest.raises(ValueError, match="model is needed by how='jvp'"):
        published().refine(**(arguments(problem) | {"model": None}))


def test_autocast(draw):
    """Half precision inside the model; labels and surrogate in float32."""
    problem = make_problem(draw, "mlp")
    problem.model.float()
    batch = arguments(problem) | {"unlabeled": problem.unlabeled.float(), "holdout": problem.holdout.float()}
    full = published().refine(**batch)
    exact = gradients(full.loss, problem.model)
    with torch.autocast("cpu", torch.bfloat16):
        half = published().refine(**batch)
    assert half.labels.dtype == half.loss.dtype == torch.float32
    assert_close(half.labels, full.labels, 0.02)
    assert_close(gradients(half.loss, problem.model), exact, 0.3)
