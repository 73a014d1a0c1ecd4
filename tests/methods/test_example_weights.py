"""Influence weights against a dense Hessian from autograd, and the weights' own bookkeeping."""

from dataclasses import asdict

import pytest
import torch
from brute_force import Layer, assert_close, make_layer, per_example, reduced
from torch import Tensor
from torch.nn import functional

from fastmeta import ExampleWeights
from fastmeta.methods.example_weights import preset

DOUBLE = {"dtype": torch.float64}


def gradient_seen_by_adam(method: ExampleWeights, index: Tensor) -> Tensor:
    """After one update the first moment is (1 - beta1) times the gradient."""
    return method.state_dict()["update.table.exp_avg"][index] / (1 - 0.9)


def influence(
    layer: Layer,
    pseudo: Tensor,
    *,
    damping: float,
    weights: Tensor | None = None,
    bias: bool = True,
    hessian: bool = True,
    view: Tensor | None = None,
    labeled: tuple[Tensor, Tensor] | None = None,
    loss: str = "cross_entropy",
    reduction: str = "mean",
) -> Tensor:
    """Eq. (6) with every matrix dense, over the flattened last layer."""
    c, d = layer.weight.shape
    flat = torch.cat([layer.weight.flatten(), layer.bias]) if bias else layer.weight.flatten()
    flat = flat.detach().requires_grad_()
    x_u = layer.features_u if view is None else view
    x_l, y_l = (layer.features_h, layer.classes) if labeled is None else labeled

    def forward(parameters: Tensor, x: Tensor) -> Tensor:
        return functional.linear(
            x, parameters[: c * d].view(c, d), parameters[c * d :] if bias else layer.bias.detach()
        )

    def training_loss(parameters: Tensor) -> Tensor:
        unlabeled = reduced(forward(parameters, x_u), pseudo, loss, weights, reduction)
        return reduced(forward(parameters, x_l), one_hot(y_l), loss, None, reduction) + unlabeled

    validation = functional.cross_entropy(forward(flat, layer.features_h), layer.classes, reduction=reduction)
    g_val = torch.autograd.grad(validation, flat)[0]
    h = torch.autograd.functional.hessian(training_loss, flat) if hessian else torch.zeros(len(flat), len(flat))
    solved = torch.linalg.solve(h + damping * torch.eye(len(flat), dtype=torch.float64), g_val)
    g_u = torch.autograd.functional.jacobian(lambda p: per_example(forward(p, x_u), pseudo, loss), flat)
    return -g_u @ solved


def one_hot(classes: Tensor) -> Tensor:
    return torch.eye(4, dtype=torch.float64)[classes]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("solver", ["cholesky", "cg", "pcg", "auto"])
def test_influence_is_that_of_the_dense_hessian(draw, solver, bias):
    layer = make_layer(draw)
    index = torch.tensor([4, 0, 9, 7, 2, 5])
    method = ExampleWeights(10, inverse_hessian=solver, damping=0.1, tol=1e-12, max_iter=500, bias=bias, **DOUBLE)
    method.refine(**layer.batch(), index=index)
    pseudo = one_hot(layer.unlabeled.logits.argmax(-1))
    assert_close(gradient_seen_by_adam(method, index), influence(layer, pseudo, damping=0.1, bias=bias))


@pytest.mark.parametrize("solver", ["cholesky", "cg", "pcg"])
def test_sums_in_place_of_means(draw, solver):
    """As Eq. (1) and (2) print them; batches of different sizes make another direction of it, not another length."""
    layer = make_layer(draw)
    options = {"inverse_hessian": solver, "damping": 0.1, "tol": 1e-12, "max_iter": 500, **DOUBLE}
    pseudo = one_hot(layer.unlabeled.logits.argmax(-1))
    for reduction in ("mean", "sum"):
        method = ExampleWeights(6, reduction=reduction, **options)
        method.refine(**layer.batch(), index=torch.arange(6))
        expected = influence(layer, pseudo, damping=0.1, reduction=reduction)
        assert_close(gradient_seen_by_adam(method, torch.arange(6)), expected)
    means = influence(layer, pseudo, damping=0.1)
    assert float(functional.cosine_similarity(means, expected, dim=0)) < 1 - 1e-9


@pytest.mark.parametrize("loss", ["binary_cross_entropy", "mse", "mse_probs"])
def test_another_loss(draw, loss):
    """Labels of a loss without a softmax are used as they are; hard ones are for probabilities."""
    layer = make_layer(draw)
    method = ExampleWeights(6, inner_loss=loss, inverse_hessian="identity", **DOUBLE)
    labels = draw.probabilities(6, 4)
    method.refine(**layer.batch(), index=torch.arange(6), labels=labels)
    used = one_hot(labels.argmax(-1)) if loss == "mse_probs" else labels
    expected = influence(layer, used, damping=1.0, hessian=False, loss=loss)
    assert_close(gradient_seen_by_adam(method, torch.arange(6)), expected)
    if loss != "mse_probs":
        with pytest.raises(ValueError, match=r"pseudo_labels must be targets \[N, C\] for a loss without a softmax"):
            method.refine(**layer.batch(), index=torch.arange(6), pseudo_labels=layer.classes[:6])
        with pytest.warns(RuntimeWarning, match="ExampleWeights learns no example weights from this batch"):
            method.refine(**layer.batch(), index=torch.arange(6))


@pytest.mark.parametrize("loss", ["mse", "binary_cross_entropy"])
def test_the_hessian_is_that_of_the_inner_loss(draw, loss):
    layer = make_layer(draw)
    method = ExampleWeights(6, inner_loss=loss, inverse_hessian="cholesky", damping=0.3, **DOUBLE)
    labels = draw.probabilities(6, 4)
    method.refine(**layer.batch(), index=torch.arange(6), labels=labels)
    assert_close(gradient_seen_by_adam(method, torch.arange(6)), influence(layer, labels, damping=0.3, loss=loss))


def test_identity_hessian(draw):
    layer = make_layer(draw)
    method = ExampleWeights(6, inverse_hessian="identity", **DOUBLE)
    method.refine(**layer.batch(), index=torch.arange(6))
    pseudo = one_hot(layer.unlabeled.logits.argmax(-1))
    expected = influence(layer, pseudo, damping=1.0, hessian=False)
    assert_close(gradient_seen_by_adam(method, torch.arange(6)), expected)


def test_a_layer_without_bias(draw):
    layer = make_layer(draw, bias=False)
    method = ExampleWeights(6, inverse_hessian="cholesky", **DOUBLE)
    method.refine(**layer.batch(), index=torch.arange(6))
    layer.bias = torch.zeros(4, dtype=torch.float64)
    pseudo = one_hot(layer.unlabeled.logits.argmax(-1))
    assert_close(gradient_seen_by_adam(method, torch.arange(6)), influence(layer, pseudo, damping=0.1, bias=False))


@pytest.mark.parametrize("masked", [True, False])
def test_strong_view_pseudo_labels_mask_and_labeled_batch(draw, masked):
    """Everything optional at once, at weights that are no longer 1."""
    layer = make_layer(draw)
    index = torch.arange(6)
    method = ExampleWeights(6, inverse_hessian="cholesky", masked=masked, **DOUBLE)
    weights = 2 * draw.uniform(6)
    state = method.state_dict()
    state["update.table.values"] = weights
    method.load_state_dict(state)
    view, mask = draw.normal(6, 5), (draw.uniform(6) > 0.4).double()
    labeled = draw.normal(3, 5), draw.classes(3, 4)
    pseudo = draw.probabilities(6, 4)
    refined = method.refine(
        **layer.batch(),
        index=index,
        strong=layer.outputs(view),
        pseudo_labels=pseudo,
        mask=mask,
        labeled=layer.outputs(labeled[0]),
        labeled_targets=labeled[1],
    )
    expected = influence(layer, pseudo, damping=0.1, weights=weights * mask, view=view, labeled=labeled)
    assert_close(gradient_seen_by_adam(method, index), expected * mask if masked else expected)
    assert torch.equal(refined.labels, layer.unlabeled.logits.detach().softmax(-1))


def test_classes_as_pseudo_labels(draw):
    layer = make_layer(draw)
    classes = draw.classes(6, 4)
    first, second = ExampleWeights(6, **DOUBLE), ExampleWeights(6, **DOUBLE)
    first.refine(**layer.batch(), index=torch.arange(6), pseudo_labels=classes)
    second.refine(**layer.batch(), index=torch.arange(6), pseudo_labels=one_hot(classes))
    assert torch.equal(first.weights, second.weights)


def test_weights_follow_masked_adam_and_stay_in_their_bounds(draw):
    layer = make_layer(draw)
    index = torch.tensor([1, 3, 4, 6, 8, 9])
    method = ExampleWeights(10, inverse_hessian="identity", lr=0.3, **DOUBLE)
    expected = torch.ones(6, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([expected], lr=0.3)
    for _ in range(5):
        refined = method.refine(**layer.batch(), index=index)
        expected.grad = influence(layer, one_hot(layer.unlabeled.logits.argmax(-1)), damping=1.0, hessian=False)
        adam.step()
        with torch.no_grad():
            expected.clamp_(0, 2)
        assert_close(refined.weights, expected, 1e-8)
    assert bool((expected == 0).any() or (expected == 2).any())
    untouched = torch.tensor([0, 2, 5, 7])
    assert torch.equal(method.weights[untouched], torch.ones(4, dtype=torch.float64))
    assert method.state_dict()["update.table.steps"].tolist() == [0, 5, 0, 5, 5, 0, 5, 0, 5, 5]


def test_weights_read_before_or_after_their_update(draw):
    layer = make_layer(draw)
    before, after = (ExampleWeights(6, read=read, **DOUBLE) for read in ("before", "after"))
    batch = layer.batch() | {"index": torch.arange(6)}
    first = before.refine(**batch).weights, after.refine(**batch).weights
    assert torch.equal(first[0], torch.ones(6, dtype=torch.float64))
    assert torch.equal(first[1], after.weights)
    assert torch.equal(before.refine(**batch).weights, first[1])


def test_an_update_every_interval_calls(draw):
    layer = make_layer(draw)
    method = ExampleWeights(6, interval=3, **DOUBLE)
    changed = []
    for _ in range(7):
        before = method.weights.clone()
        refined = method.refine(**layer.batch(), index=torch.arange(6))
        assert torch.equal(refined.weights, method.weights)
        changed.append(not torch.equal(before, method.weights))
    assert changed == [False, False, True, False, False, True, False]


def one_adam_step(gradient: Tensor) -> Tensor:
    """A weight of 1 after one step of Adam at 0.01, in the official code's words."""
    m, v = 0.1 * gradient, 0.001 * gradient**2
    return 1 - 0.01 * (m / (1 - 0.9)) / ((v / (1 - 0.999)).sqrt() + 1e-8)


def test_one_shared_weight_has_the_sum_of_the_gradients(draw):
    """Eq. (1)'s single lambda: its influence is that of ``sum_u l_u``. It needs no index."""
    layer = make_layer(draw)
    mask = (draw.uniform(6) > 0.3).double()
    method = ExampleWeights(100, shared=True, inverse_hessian="cholesky", **DOUBLE)
    assert method.weights.shape == (1,)
    refined = method.refine(**layer.batch(), mask=mask)
    pseudo = one_hot(layer.unlabeled.logits.argmax(-1))
    each = influence(layer, pseudo, damping=0.1, weights=mask) * mask
    assert_close(gradient_seen_by_adam(method, torch.tensor([0])), each.sum().view(1))
    assert_close(refined.weights, one_adam_step(each.sum()).expand(6))


def test_a_shared_weight_moves_with_its_steps_and_is_saved(draw):
    layer = make_layer(draw)
    before, after = (ExampleWeights(9, shared=True, read=read, **DOUBLE) for read in ("before", "after"))
    first = before.refine(**layer.batch()).weights, after.refine(**layer.batch()).weights
    assert torch.equal(first[0], torch.ones(6, dtype=torch.float64))
    assert torch.equal(first[1], after.weights.expand(6))
    assert not torch.equal(*first)
    resumed = ExampleWeights(9, shared=True, read="after", **DOUBLE)
    resumed.load_state_dict(after.state_dict())
    assert torch.equal(resumed.refine(**layer.batch()).weights, after.refine(**layer.batch()).weights)
    before.refine(**layer.batch())
    assert torch.equal(first[0], torch.ones(6, dtype=torch.float64)), "the weights handed out are copies"


def test_duplicates_in_a_batch(draw):
    """The gradients of an example drawn twice are added, or the last one alone counts, as in NumPy's assignment."""
    layer = make_layer(draw)
    index = torch.tensor([7, 2, 7, 0, 2, 7])
    each = influence(layer, one_hot(layer.unlabeled.logits.argmax(-1)), damping=1.0, hessian=False)
    expected = {"sum": torch.zeros(10, **DOUBLE).index_add(0, index, each), "last": torch.zeros(10, **DOUBLE)}
    for place, gradient in zip(index.tolist(), each, strict=True):
        expected["last"][place] = gradient
    for duplicates, gradient in expected.items():
        method = ExampleWeights(10, duplicates=duplicates, inverse_hessian="identity", **DOUBLE)
        method.refine(**layer.batch(), index=index)
        assert_close(gradient_seen_by_adam(method, torch.arange(10)), gradient)
        assert method.state_dict()["update.table.steps"].tolist() == [1, 0, 1, 0, 0, 0, 0, 1, 0, 0]
    assert not torch.allclose(expected["sum"], expected["last"])


PRESET_DIFFERENCES = {
    "damping": {"damping": 1.0},
    "bias": {"bias": False},
    "masked": {"masked": False},
    "duplicates": {"duplicates": "last"},
    "reduction": {"reduction": "mean"},
}
TWICE = torch.tensor([0, 1, 2, 3, 1, 5])


def preset_gradient(layer: Layer, name: str, mask: Tensor, index: Tensor, **overrides) -> Tensor:
    method = ExampleWeights.from_preset(name, 6, interval=1, **DOUBLE, **overrides)
    method.refine(**layer.batch(), index=index, mask=mask)
    return gradient_seen_by_adam(method, torch.arange(6))


def test_presets_are_what_they_say(draw):
    layer = make_layer(draw, (6, 3, 4), holdout=30)
    mask = torch.tensor([1.0, 0, 1, 1, 0, 1], dtype=torch.float64)
    pseudo = one_hot(layer.unlabeled.logits.argmax(-1))
    paper = influence(layer, pseudo, damping=5e-4, weights=mask, reduction="sum")
    assert_close(preset_gradient(layer, "paper", mask, torch.arange(6)), paper * mask, 1e-8)
    code = influence(layer, pseudo, damping=1.0, weights=mask, bias=False)
    assert_close(preset_gradient(layer, "official_code", mask, torch.arange(6)), code)


@pytest.mark.parametrize("left_out", [None, *PRESET_DIFFERENCES])
def test_presets_differ_exactly_there(draw, left_out):
    """The paper's preset with the differences put in is the code's; with one of them missing it is not."""
    layer = make_layer(draw, (6, 3, 4), holdout=30)
    mask = torch.tensor([1.0, 1, 0, 1, 1, 1], dtype=torch.float64)
    overrides = {k: v for name, change in PRESET_DIFFERENCES.items() if name != left_out for k, v in change.items()}
    same = torch.equal(
        preset_gradient(layer, "paper", mask, TWICE, **overrides), preset_gradient(layer, "official_code", mask, TWICE)
    )
    assert same == (left_out is None)


def test_every_difference_of_the_presets_has_a_test():
    paper, code = (asdict(preset(name)) for name in ("paper", "official_code"))
    assert {name for name in paper if paper[name] != code[name]} == {*PRESET_DIFFERENCES, "read"}


def test_presets_read_the_weights_after_and_before(draw):
    layer = make_layer(draw)
    for name, unchanged in (("paper", False), ("official_code", True)):
        method = ExampleWeights.from_preset(name, 6, interval=1)
        weights = method.refine(**layer.batch(), index=torch.arange(6)).weights
        assert torch.equal(weights, torch.ones(6, dtype=torch.float64)) == unchanged
        assert ExampleWeights.from_preset(name, 6).interval == 100


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"inverse_hessian": "lu"}, ValueError, "inverse_hessian must be one of"),
        ({"inner_loss": "hinge"}, ValueError, "inner_loss must be one of"),
        ({"reduction": "max"}, ValueError, "reduction must be one of mean, sum, got 'max'"),
        ({"damping": -1.0}, ValueError, "damping must be >= 0"),
        ({"interval": 0}, ValueError, "interval must be >= 1"),
        ({"read": "never"}, ValueError, "read must be"),
        ({"num_examples": 0}, ValueError, "num_examples must be >= 1"),
        ({"num_examples": 2.5}, TypeError, "num_examples must be an int"),
    ],
)
def test_options_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        ExampleWeights(**{"num_examples": 5, **options})


def test_pseudo_labels_are_checked(draw):
    layer = make_layer(draw)
    batch = layer.batch() | {"index": torch.arange(6)}
    with pytest.raises(ValueError, match="pseudo_labels must be"):
        ExampleWeights(6).refine(**batch, pseudo_labels=torch.zeros(6, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="strong must have N = 6 like unlabeled, got 5"):
        ExampleWeights(6).refine(**batch, strong=layer.outputs(draw.normal(5, 5)))
