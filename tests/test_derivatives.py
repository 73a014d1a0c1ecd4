"""Derivatives one by one; their combination with directions is tested with the methods."""

import dataclasses

import pytest
import torch
from brute_force import assert_close, make_layer, per_example
from cases import Draw
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from fastmeta.derivatives import ExampleWeightGradient, FeatureSimilarity, FiniteDifference, LabelGradient
from fastmeta.directions import HoldoutGradient
from fastmeta.losses import LOSSES
from fastmeta.problem import Direction, LastLayerProblem, Rows

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(2, 7))


def make_problem(draw: Draw, shape: tuple[int, int, int] = (6, 5, 4), **options) -> LastLayerProblem:
    layer = make_layer(draw, shape)
    return LastLayerProblem(
        unlabeled=Rows(layer.features_u, layer.unlabeled.logits.detach()),
        labels=draw.probabilities(shape[0], shape[2]),
        holdout=Rows(layer.features_h, layer.holdout.logits.detach()),
        targets=layer.classes,
        **options,
    )


@settings(max_examples=25, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 2**31))
def test_feature_similarity_with_bias_is_the_exact_one_up_to_a_constant_in_each_row(shape, seed):
    """Corrected Eq. (6) for cross-entropy: what is left is along (1, ..., 1), to which softmax is blind."""
    problem = make_problem(Draw(torch.Generator().manual_seed(seed)), shape)
    exact = LabelGradient("cross_entropy", rate=0.3)(problem, HoldoutGradient()(problem))
    factors = HoldoutGradient(factored=True)(problem)
    similar = FeatureSimilarity(rate=0.3, bias=True, reduction="mean")(problem, factors)
    difference = similar - exact
    assert (difference - difference.mean(-1, keepdim=True)).norm() <= 1e-12 * (1 + exact.norm())
    p = problem.labels
    through_softmax = p * (difference - (p * difference).sum(-1, keepdim=True))
    assert through_softmax.norm() <= 1e-12 * (1 + exact.norm())


@pytest.mark.parametrize("missing", ["bias", "jacobian"])
def test_feature_similarity_as_printed_misses_bias_and_jacobian(draw, missing):
    problem = make_problem(draw)
    factors = HoldoutGradient(factored=True)(problem)
    if missing == "bias":
        printed = FeatureSimilarity()(problem, factors)
        corrected = FeatureSimilarity(bias=True)(problem, factors)
        assert_close(corrected - printed, factors.residual.sum(0).expand(6, 4))
    else:
        exact = LabelGradient("mse_probs", reduction="sum")(problem, HoldoutGradient()(problem))
        similar = FeatureSimilarity(bias=True)(problem, factors)
        p = problem.unlabeled.logits.softmax(-1)
        assert_close(2 * (p * similar - p * (p * similar).sum(-1, keepdim=True)), exact)


def test_feature_similarity_needs_factors(draw):
    problem = make_problem(draw)
    with pytest.raises(TypeError, match="direction must be Factors"):
        FeatureSimilarity()(problem, HoldoutGradient()(problem))


@settings(max_examples=25, deadline=None)
@given(shape=SHAPES, loss=st.sampled_from(list(LOSSES)), seed=st.integers(0, 2**31))
def test_example_weight_gradient(shape, loss, seed):
    """d/dw_i <v, theta'(w)> of an inner step, v any direction."""
    draw = Draw(torch.Generator().manual_seed(seed))
    layer = make_layer(draw, shape)
    n, d, c = shape
    labels, v = draw.probabilities(n, c), Direction(draw.normal(c, d), draw.normal(c))
    weights = draw.uniform(n).requires_grad_()
    ahead = layer.inner_step(labels, rate=0.3, loss=loss, weights=weights)
    expected = torch.autograd.grad([p for p in ahead if p is not None], weights, list(v))[0]
    problem = LastLayerProblem(
        Rows(layer.features_u, layer.unlabeled.logits.detach()),
        labels,
        Rows(layer.features_h, layer.holdout.logits.detach()),
        layer.classes,
        weights=weights.detach(),
    )
    assert_close(ExampleWeightGradient(loss, rate=0.3, reduction="mean")(problem, v), expected)


@pytest.mark.parametrize("masked", [True, False])
def test_mask_in_the_example_weight_gradient(draw, masked):
    problem = make_problem(draw)
    v = Direction(draw.normal(4, 5), None)
    mask = draw.uniform(6)
    plain = ExampleWeightGradient()(problem, v)
    z = problem.unlabeled.features @ v.weight.T
    f = problem.unlabeled.logits.clone().requires_grad_()
    r = torch.autograd.grad(per_example(f, problem.labels, "cross_entropy").sum(), f)[0]
    assert_close(plain, -(r * z).sum(-1))
    got = ExampleWeightGradient(masked=masked)(dataclasses.replace(problem, mask=mask), v)
    assert_close(got, plain * mask if masked else plain)


@pytest.mark.parametrize("derivative", [LabelGradient(), FiniteDifference(), FeatureSimilarity()])
def test_weights_and_mask_multiply_the_label_gradient(draw, derivative):
    problem = make_problem(draw)
    direction = HoldoutGradient(factored=True)(problem)
    weights, mask = draw.uniform(6), draw.uniform(6)
    both = derivative(dataclasses.replace(problem, weights=weights, mask=mask), direction)
    assert_close(both, derivative(problem, direction) * (weights * mask).unsqueeze(-1))


def test_finite_difference_of_a_bias_that_does_not_move(draw):
    problem = make_problem(draw)
    v = Direction(draw.normal(4, 5), None)
    plus, minus, epsilon = FiniteDifference(radius=0.5).probes(problem, v)
    assert_close(epsilon * v.weight.norm(), torch.tensor(0.5, dtype=torch.float64))
    moved = functional.linear(problem.unlabeled.features, 2 * epsilon * v.weight)
    assert_close(plus - minus, moved)
