"""Learning to Impute against an inner step of SGD that autograd differentiates through."""

import pytest
import torch
from brute_force import Layer, assert_close, make_layer
from cases import Draw
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from fastmeta import L2I, capture_features
from fastmeta.losses import LOSSES

SOFTMAX_LOSSES = ["mse_probs", "cross_entropy"]
RATE = 0.7
biases = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])


def published(**options) -> L2I:
    """Hold-out gradient at theta* and at its own length, whatever the defaults are."""
    return L2I(**{"rate": RATE, "look_ahead": True, "unit_length": False, "weight": 1.0, **options})


def label_gradient(method: L2I, layer: Layer, labels: Tensor, **batch) -> Tensor:
    """dG/dz is what V2's surrogate has for a gradient with respect to the labels."""
    z = labels.clone().requires_grad_()
    return torch.autograd.grad(method.refine(**layer.batch(), labels=z, **batch).loss, z)[0]


def brute_force(layer: Layer, labels: Tensor, outer_loss: str = "cross_entropy", **inner) -> Tensor:
    z = labels.clone().requires_grad_()
    ahead = layer.inner_step(z, **{"rate": RATE, "loss": "mse_probs", **inner})
    return torch.autograd.grad(layer.outer(ahead, outer_loss), z)[0]


@biases
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("outer_loss", list(LOSSES))
@pytest.mark.parametrize("inner_loss", list(LOSSES))
def test_label_gradient(draw, inner_loss, outer_loss, reduction, bias):
    layer = make_layer(draw, bias=bias)
    labels = draw.probabilities(6, 4)
    method = published(inner_loss=inner_loss, outer_loss=outer_loss, reduction=reduction)
    expected = brute_force(layer, labels, outer_loss, loss=inner_loss, reduction=reduction)
    assert_close(label_gradient(method, layer, labels), expected)


@pytest.mark.parametrize("inner_loss", list(LOSSES))
@pytest.mark.parametrize("labeled_weight", [0.0, 1.0])
def test_label_gradient_with_mask_and_labeled_loss(draw, inner_loss, labeled_weight):
    layer = make_layer(draw)
    labels, mask = draw.probabilities(6, 4), draw.uniform(6)
    method = published(inner_loss=inner_loss, labeled_weight=labeled_weight)
    expected = brute_force(layer, labels, loss=inner_loss, weights=mask, labeled_weight=labeled_weight)
    assert_close(label_gradient(method, layer, labels, mask=mask), expected)


def test_labeled_loss_on_other_examples_than_the_holdout(draw):
    layer, other = make_layer(draw), make_layer(draw, holdout=3)
    labels = draw.probabilities(6, 4)
    labeled = layer.outputs(other.features_h)
    method = published(labeled_weight=0.5)
    z = labels.clone().requires_grad_()
    inner = functional.linear(layer.features_u, *layer.parameters).softmax(-1).sub(z).square().sum(-1).mean()
    inner = inner + 0.5 * functional.cross_entropy(labeled.logits, other.classes)
    ahead = layer.step(layer.parameters, layer.gradient(inner, layer.parameters, create_graph=True), RATE)
    expected = torch.autograd.grad(layer.outer(ahead), z)[0]
    assert_close(label_gradient(method, layer, labels, labeled=labeled, labeled_targets=other.classes), expected)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(2, 7)),
    holdout=st.integers(1, 9),
    inner_loss=st.sampled_from(list(LOSSES)),
    seed=st.integers(0, 2**31),
)
def test_label_gradient_of_any_shape(shape, holdout, inner_loss, seed):
    draw = Draw(torch.Generator().manual_seed(seed))
    layer = make_layer(draw, shape, holdout)
    labels = draw.probabilities(shape[0], shape[2])
    expected = brute_force(layer, labels, loss=inner_loss)
    assert_close(label_gradient(published(inner_loss=inner_loss), layer, labels), expected)


@pytest.mark.parametrize("inner_loss", SOFTMAX_LOSSES)
def test_v2_pulls_back_through_the_imputer_and_the_whole_model(generator, inner_loss):
    """The gradient of the surrogate in every parameter, those of the body included."""
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
    model = nn.Sequential(nn.Linear(3, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4)).double()
    inputs_l, inputs_u = torch.randn(5, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    targets = torch.randint(4, (5,))
    with capture_features(model) as tape:
        logits_l, logits_u = model(inputs_l), model(inputs_u)
    refined = published(inner_loss=inner_loss).refine(
        unlabeled=tape.outputs(logits_u), holdout=tape.outputs(logits_l), targets=targets
    )
    got = torch.autograd.grad(refined.loss, list(model.parameters()), retain_graph=True)
    assert torch.equal(refined.labels, logits_u.detach().softmax(-1))
    assert torch.equal(refined.weights, torch.ones(6, dtype=torch.float64))

    fc = model[-1]
    layer = Layer(fc.weight, fc.bias, model[:-1](inputs_u).detach(), model[:-1](inputs_l).detach(), targets)
    # Theta acts through the labels alone; the inner step starts at a theta held fixed.
    z = logits_u.softmax(-1)
    dz = brute_force(layer, z.detach(), loss=inner_loss)
    expected = torch.autograd.grad(z, list(model.parameters()), dz)
    for g, e in zip(got, expected, strict=True):
        assert_close(g, e)


def test_v1_steps_on_the_labels(draw):
    layer = make_layer(draw)
    labels = draw.probabilities(6, 4)
    gradient = brute_force(layer, labels)
    step = 2 / float(gradient.max())  # at the largest entry a label, at most 1, falls below 0
    options = {"label_space": "probabilities", "label_step": step}
    refined = published(variant="V1", project=False, **options).refine(**layer.batch(), labels=labels)
    assert_close(refined.labels, labels - step * gradient)
    assert refined.loss.item() == 0
    projected = published(variant="V1", project=True, **options).refine(**layer.batch(), labels=labels).labels
    moved = (labels - step * gradient).clamp_min(0)
    assert bool((labels - step * gradient < 0).any())
    assert_close(projected, moved / moved.sum(-1, keepdim=True))


def test_v1_steps_on_the_logits_of_the_labels(draw):
    layer = make_layer(draw)
    q = draw.normal(6, 4).requires_grad_()
    ahead = layer.inner_step(q.softmax(-1), rate=RATE, loss="mse_probs")
    moved = q - 5.0 * torch.autograd.grad(layer.outer(ahead), q)[0]
    method = published(variant="V1", label_space="logits", label_step=5.0)
    assert_close(method.refine(**layer.batch(), labels=q.softmax(-1).detach()).labels, moved.softmax(-1))


def test_v1_with_labels_that_are_exactly_zero(draw):
    layer = make_layer(draw)
    labels = torch.eye(4, dtype=torch.float64)[draw.classes(6, 4)]
    refined = published(variant="V1", label_space="logits").refine(**layer.batch(), labels=labels)
    assert torch.equal(refined.labels, labels)


def test_v1_lowers_the_holdout_loss_of_the_next_inner_step(draw):
    layer = make_layer(draw)
    labels = draw.probabilities(6, 4)
    method = published(variant="V1", label_space="logits", label_step=0.1)
    refined = method.refine(**layer.batch(), labels=labels).labels
    before, after = (layer.outer(layer.inner_step(z, rate=RATE, loss="mse_probs")) for z in (labels, refined))
    assert after.item() < before.item()


def test_regression_imputes_the_outputs_themselves(draw):
    layer = make_layer(draw)
    method = published(
        variant="V1", inner_loss="mse", outer_loss="mse", label_space="probabilities", project=False, label_step=2.0
    )
    imputed = layer.unlabeled.logits.detach()
    batch = layer.batch() | {"targets": layer.targets}
    expected = imputed - 2.0 * brute_force(layer, imputed, "mse", loss="mse")
    assert_close(method.refine(**batch).labels, expected)


def test_eq6_as_printed(draw):
    """Journal version, Eq. (6): eta sum_h (p_h - y_h) <h_h, h_u>, no bias, no mean, nothing of the inner loss."""
    layer = make_layer(draw)
    labels = draw.probabilities(6, 4)
    method = published(derivative="eq6", reduction="sum", outer_reduction="sum", look_ahead=False)
    f_h = layer.holdout.logits.detach()
    expected = torch.zeros(6, 4, dtype=torch.float64)
    for u in range(6):
        for h in range(7):
            similarity = layer.features_u[u] @ layer.features_h[h]
            expected[u] += RATE * similarity * (f_h[h].softmax(-1) - layer.targets[h])
    assert_close(label_gradient(method, layer, labels), expected)


def test_eq6_takes_the_holdout_predictions_at_theta_star(draw):
    layer = make_layer(draw)
    labels = draw.probabilities(6, 4)
    ahead = layer.inner_step(labels, rate=RATE, loss="mse_probs", reduction="sum")
    p = functional.linear(layer.features_h, *ahead).softmax(-1).detach()
    expected = RATE * layer.features_u @ layer.features_h.T @ (p - layer.targets)
    got = label_gradient(published(derivative="eq6", reduction="sum", outer_reduction="sum"), layer, labels)
    assert_close(got, expected)
    assert float((got - label_gradient(published(reduction="sum"), layer, labels)).norm()) > 1e-3


@pytest.mark.parametrize("derivative", ["exact", "eq6"])
def test_unit_length_changes_the_scale_alone(draw, derivative):
    layer = make_layer(draw)
    labels = draw.probabilities(6, 4)
    raw = label_gradient(published(derivative=derivative), layer, labels)
    unit = label_gradient(published(derivative=derivative, unit_length=True), layer, labels)
    ahead = layer.inner_step(labels, rate=RATE, loss="mse_probs")
    weight, bias = (p.detach().requires_grad_() for p in ahead)
    gradient = torch.autograd.grad(layer.outer((weight, bias)), (weight, bias))
    parts = gradient if derivative == "exact" else gradient[:1]
    assert_close(unit * torch.cat([g.flatten() for g in parts]).norm(), raw)


def test_a_holdout_without_error_moves_nothing(draw):
    """A gradient of exactly 0 has no direction: no NaN."""
    layer = make_layer(draw)
    batch = layer.batch() | {"targets": layer.holdout.logits.detach()}
    refined = L2I(outer_loss="mse").refine(**batch)
    assert refined.loss.item() == 0


def test_defaults_are_the_measured_configuration(draw):
    """V2; labeled gradient at theta at length 1; cotangent 2 J_p z; weight 0.5 on a mean over the batch."""
    layer = make_layer(draw)
    value = layer.outer(layer.parameters)
    g_w, g_b = layer.gradient(value, layer.parameters)
    length = torch.cat([g_w.flatten(), g_b]).norm()
    z = (layer.features_u @ g_w.T + g_b) / length
    p = layer.unlabeled.logits.softmax(-1)
    cotangent = 2 * (p * z - p * (p * z).sum(-1, keepdim=True)).detach()
    expected = 0.5 * (cotangent * p).sum(-1).mean()
    refined = L2I().refine(**layer.batch())
    assert_close(refined.loss, expected)
    parameters = list(layer.parameters)
    for got, e in zip(
        torch.autograd.grad(refined.loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        assert_close(got, e)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "V3"}, "variant must be one of V1, V2, got 'V3'"),
        ({"derivative": "eq5"}, "derivative must be one of exact, eq6"),
        ({"reduction": "max"}, "reduction must be one of mean, sum"),
        ({"inner_loss": "hinge"}, "inner_loss must be one of"),
        ({"rate": -1.0}, "rate must be >= 0"),
        ({"how": "exact"}, "how must be one of double_backward, jvp"),
        ({"how": "jvp", "derivative": "eq6"}, "derivative='eq6' needs how='last_layer', got 'jvp'"),
        ({"derivative": "eq6", "look_ahead": True, "steps": 2}, "derivative='eq6' needs steps=1, got 2"),
        ({"steps": 2}, "steps, momentum and labeled_weight need look_ahead=True"),
        ({"steps": 0, "look_ahead": True}, "steps must be >= 1, got 0"),
        ({"labeled_weight": 1.0}, "steps, momentum and labeled_weight need look_ahead=True"),
        ({"radius": 0.0}, "radius must be > 0"),
        ({"variant": "V1", "inner_loss": "mse"}, "needs label_space='probabilities' and project=False"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        L2I(**options)


def test_v2_needs_the_graph(draw):
    layer = make_layer(draw)
    batch = layer.batch()
    batch["unlabeled"] = batch["unlabeled"]._replace(logits=batch["unlabeled"].logits.detach())
    with pytest.raises(ValueError, match=r"unlabeled\.logits must be on the graph"):
        L2I("V2").refine(**batch)
    with pytest.raises(ValueError, match="labels must be on the graph"):
        L2I("V2").refine(**batch, labels=draw.probabilities(6, 4))
    with pytest.raises(TypeError, match=r"labels must be floating .* of classes F\.one_hot"):
        L2I("V1").refine(**batch, labels=torch.zeros(6, dtype=torch.int64))
    assert L2I("V1").refine(**batch).labels.shape == (6, 4)
