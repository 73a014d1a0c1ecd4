"""Meta-Gradient against the label gradient of an inner step, and its finite differences against perturbed layers."""

import math

import pytest
import torch
from brute_force import Layer, assert_close, make_layer
from torch import Tensor
from torch.nn import functional

from fastmeta import MetaGradient

ALPHA, BETA = 0.3, 2.0


def label_gradient(layer: Layer, labels: Tensor) -> Tensor:
    """Eq. (13): d/dy of the labeled loss after an inner step at ALPHA, its gradient taken at theta."""
    y = labels.clone().requires_grad_()
    ahead = layer.inner_step(y, rate=ALPHA, loss="mse_probs")
    at_theta = layer.gradient(layer.outer(layer.parameters), layer.parameters)
    return torch.autograd.grad([p for p in ahead if p is not None], y, [g for g in at_theta if g is not None])[0]


def projected(labels: Tensor) -> Tensor:
    clipped = labels.clamp_min(0)
    return clipped / clipped.sum(-1, keepdim=True)


def probe(layer: Layer, radius: float) -> Tensor:
    """``(p(theta + epsilon v) - p(theta - epsilon v)) / epsilon`` with the parameters really perturbed."""
    v = layer.gradient(layer.outer(layer.parameters), layer.parameters)
    epsilon = radius / math.sqrt(sum(float(g.square().sum()) for g in v if g is not None))
    plus, minus = (
        functional.linear(layer.features_u, *layer.step(layer.parameters, v, s)) for s in (-epsilon, epsilon)
    )
    return ((plus.softmax(-1) - minus.softmax(-1)) / epsilon).detach()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("project", [True, False])
def test_exact_step(draw, bias, project):
    layer = make_layer(draw, bias=bias)
    labels = draw.probabilities(6, 4)
    step = BETA / label_gradient(layer, labels).abs().max().item()
    moved = labels - step * label_gradient(layer, labels)
    method = MetaGradient(step=step, rate=ALPHA, project=project)
    refined = method.refine(**layer.batch(), labels=labels)
    assert bool((moved < 0).any())
    assert_close(refined.labels, projected(moved) if project else moved)
    assert torch.equal(refined.weights, torch.ones(6, dtype=torch.float64))
    assert refined.loss.item() == 0


def test_without_rate_the_step_is_that_of_algorithm_2(draw):
    """No alpha / B: beta times 2 D_v p, whatever the size of the batch."""
    layer = make_layer(draw)
    imputed = layer.unlabeled.logits.detach().softmax(-1)
    expected = imputed - 0.01 * label_gradient(layer, imputed) * len(imputed) / ALPHA
    assert_close(MetaGradient(step=0.01, project=False).refine(**layer.batch()).labels, expected)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("radius", [1e-3, 0.01, 1.0])
def test_finite_difference_is_the_difference_of_perturbed_layers(draw, radius, bias):
    layer = make_layer(draw, bias=bias)
    imputed = layer.unlabeled.logits.detach().softmax(-1)
    method = MetaGradient(step=BETA, rate=ALPHA, how="last_layer_difference", radius=radius, project=False)
    expected = imputed - BETA * ALPHA / 6 * probe(layer, radius)
    assert_close(method.refine(**layer.batch()).labels - imputed, expected - imputed, 1e-6)


def test_finite_difference_converges_to_the_derivative_at_second_order(draw):
    layer = make_layer(draw)
    exact = MetaGradient(step=1.0, project=False).refine(**layer.batch()).labels
    errors = []
    for radius in (0.2, 0.1, 0.05):
        method = MetaGradient(step=1.0, how="last_layer_difference", radius=radius, project=False)
        errors.append((method.refine(**layer.batch()).labels - exact).norm().item())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.1)


def test_the_fused_step_is_the_composed_one(draw):
    """A mask of ones goes through derivative and update; without it one operator does both."""
    layer = make_layer(draw)
    method = MetaGradient(step=3.0, how="last_layer_difference")
    fused = method.refine(**layer.batch()).labels
    composed = method.refine(**layer.batch(), mask=torch.ones(6)).labels
    assert_close(fused, composed, 1e-12)


def test_a_labeled_batch_without_gradient_moves_nothing(draw):
    layer = make_layer(draw)
    batch = layer.batch() | {"targets": layer.holdout.logits.detach().softmax(-1)}
    imputed = layer.unlabeled.logits.detach().softmax(-1)
    for how in ("last_layer", "last_layer_difference"):
        assert_close(MetaGradient(how=how).refine(**batch).labels, imputed, 1e-9)


def test_presets_differ_by_projection_alone_at_the_published_batch_size(draw):
    layer = make_layer(draw, (128, 5, 4))
    layer.features_u *= 20
    paper, code = (
        MetaGradient.from_preset(name, how="last_layer_difference").refine(**layer.batch()).labels
        for name in ("paper", "official_code")
    )
    assert bool((paper < 0).any())
    assert_close(projected(paper), code, 1e-12)


def test_presets_differ_by_alpha_over_b_at_another(draw):
    """Eq. (16) has alpha / B before the difference, the code's step is that of any batch."""
    layer = make_layer(draw, (64, 5, 4))
    imputed = layer.unlabeled.logits.detach().softmax(-1)
    paper, code = (
        MetaGradient.from_preset(name, project=False, how="last_layer_difference").refine(**layer.batch()).labels
        - imputed
        for name in ("paper", "official_code")
    )
    assert_close(paper, 2 * code, 1e-9)


def test_the_step_follows_a_schedule(draw):
    layer = make_layer(draw)
    method = MetaGradient(step=0.1)
    method.step = 0.7
    assert torch.equal(method.refine(**layer.batch()).labels, MetaGradient(step=0.7).refine(**layer.batch()).labels)
    with pytest.raises(ValueError, match="step must be finite"):
        method.step = float("nan")


def test_the_rate_follows_a_schedule(draw):
    layer = make_layer(draw)
    for how in ("last_layer", "last_layer_difference"):
        method = MetaGradient(how=how, step=2.0, rate=0.1, project=False)
        method.rate = 0.3
        expected = MetaGradient(how=how, step=2.0, rate=0.3, project=False)
        assert torch.equal(method.refine(**layer.batch()).labels, expected.refine(**layer.batch()).labels)
    with pytest.raises(ValueError, match="rate must stay None, which leaves out alpha"):
        MetaGradient().rate = 0.1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"how": "exact"}, ValueError, "how must be one of last_layer, last_layer_difference, jvp"),
        ({"statistics": "eval"}, ValueError, "statistics must be one of batch, running, got 'eval'"),
        ({"radius": 0.0}, ValueError, "radius must be > 0"),
        ({"rate": "0.1"}, TypeError, "rate must be a number"),
        ({"process_group": 2}, TypeError, "process_group must be"),
    ],
)
def test_options_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        MetaGradient(**options)
