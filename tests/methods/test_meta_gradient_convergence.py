"""The convergence theorem of the Meta-Gradient slides, and the diagnostic of its condition."""

import itertools
import math

import pytest
import torch
from cases import Draw
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional
from whole_model_brute_force import Bilevel, dense_hessian, forward
from whole_model_nets import NETS

from fastmeta import MetaGradient
from fastmeta.methods.step_condition import StepCondition

ALPHA = 0.3
UNLABELED = 6


class Training:
    """Algorithm 1 on a small smooth net, in float64: every step has other unlabeled examples."""

    def __init__(self, draw: Draw) -> None:
        self.model, make = NETS["mlp"](draw.generator, width=3, hidden=4)
        self.x, self.y = make(8), draw.classes(8, 3)
        self.make = make

    def loss(self) -> float:
        """G, Eq. (7)."""
        with torch.no_grad():
            return float(functional.cross_entropy(self.model(self.x), self.y))

    def condition(self, method: MetaGradient, unlabeled: Tensor, **options) -> StepCondition:
        return method.step_condition(
            model=self.model, unlabeled=unlabeled, holdout=self.x, targets=self.y, iterations=15, **options
        )

    def step(self, method: MetaGradient, unlabeled: Tensor, lr: float) -> None:
        refined = method.refine(model=self.model, unlabeled=unlabeled, holdout=self.x, targets=self.y)
        loss = (self.model(unlabeled).softmax(-1) - refined.labels).square().sum(-1).mean()
        parameters = list(self.model.parameters())
        for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.data.sub_(lr * g)


@pytest.mark.parametrize(("how", "rate"), [("jvp", ALPHA), ("finite_difference", None)])
def test_the_labeled_loss_never_rises_under_the_condition(draw, how, rate):
    training = Training(draw)
    losses = [training.loss()]
    for _ in range(15):
        unlabeled = training.make(UNLABELED)
        method = MetaGradient(how=how, rate=rate, project=False, radius=1e-3)
        method.step = 0.99 * training.condition(method, unlabeled, lr=ALPHA).largest_step
        training.step(method, unlabeled, ALPHA)
        losses.append(training.loss())
    assert all(after < before for before, after in itertools.pairwise(losses))


def test_it_rises_for_a_step_far_above_the_condition(draw):
    """A factor of 2 B is to spare; 200 B is beyond it."""
    training = Training(draw)
    method = MetaGradient(how="jvp", rate=ALPHA, project=False)
    for _ in range(20):
        before, unlabeled = training.loss(), training.make(UNLABELED)
        method.step = 200 * UNLABELED * training.condition(method, unlabeled).largest_step
        assert not training.condition(method, unlabeled).satisfied
        training.step(method, unlabeled, ALPHA)
        if training.loss() > before:
            return
    pytest.fail(f"the loss fell in every step, to {training.loss()}")


def test_a_step_is_the_mean_gram_matrix_times_the_labeled_gradient(draw):
    """``theta - (4 alpha^2 beta / B) (1/B sum_i J_i^T J_i) grad G``, which the theorem's proof bounds."""
    training = Training(draw)
    model, unlabeled, beta = training.model, training.make(UNLABELED), 2.0
    theta = {name: p.detach().clone() for name, p in model.named_parameters()}
    jacobian = dense_jacobian(model, unlabeled)
    gram = torch.einsum("ncp,ncq->pq", jacobian, jacobian) / UNLABELED
    g = torch.autograd.grad(functional.cross_entropy(model(training.x), training.y), list(model.parameters()))
    expected = -4 * ALPHA**2 * beta / UNLABELED * gram @ flat(g)
    training.step(MetaGradient(how="jvp", rate=ALPHA, step=beta, project=False), unlabeled, ALPHA)
    moved = flat([p.detach() - theta[name] for name, p in model.named_parameters()])
    assert float((moved - expected).norm()) < 1e-9 * float(expected.norm())


def flat(tensors) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def dense_jacobian(model: nn.Module, inputs: Tensor) -> Tensor:
    """Of the predicted probabilities ``[N, C, P]``."""
    theta = {name: p.detach() for name, p in model.named_parameters()}
    parts = jacrev(lambda t: functional_call(model, t, (inputs,)).softmax(-1))(theta)
    return torch.cat([part.flatten(2) for part in parts.values()], dim=2)


def test_both_norms_against_dense_matrices(draw):
    training = Training(draw)
    unlabeled = training.make(UNLABELED)
    method = MetaGradient(how="jvp", rate=ALPHA, step=1.0)
    found = method.step_condition(
        model=training.model, unlabeled=unlabeled, holdout=training.x, targets=training.y, iterations=400
    )
    outer = Bilevel(training.model, training.x, functional.one_hot(training.y, 3).double(), training.x, training.y)
    hessian = dense_hessian(Bilevel(**{**vars(outer), "loss": "cross_entropy"}))
    lipschitz = float(torch.linalg.eigvalsh(hessian).abs().max())
    jacobian = dense_jacobian(training.model, unlabeled)
    norm = float(torch.linalg.matrix_norm(jacobian.flatten(0, 1), 2)) / math.sqrt(UNLABELED)
    # At most the published M, a bound for each example.
    assert norm <= max(float(torch.linalg.matrix_norm(j, 2)) for j in jacobian) * (1 + 1e-12)
    assert found.lipschitz == pytest.approx(lipschitz, rel=1e-3)
    assert found.jacobian_norm == pytest.approx(norm, rel=1e-3)
    assert found.lipschitz <= lipschitz * (1 + 1e-9)  # from below
    largest = 1 / (4 * ALPHA**2 * found.jacobian_norm**2 * found.lipschitz)
    assert found.largest_step == pytest.approx(largest, rel=1e-12)
    assert found.satisfied == (largest > 1.0)


def test_without_alpha_over_b_the_step_is_that_of_alpha_b(draw):
    """One and the same move of the model, one and the same verdict."""
    training = Training(draw)
    unlabeled = training.make(UNLABELED)
    given = MetaGradient(how="jvp", rate=ALPHA, step=1.0)
    without = MetaGradient(how="jvp", step=ALPHA / UNLABELED)
    first, second = training.condition(given, unlabeled), training.condition(without, unlabeled, lr=ALPHA)
    assert second.largest_step == pytest.approx(first.largest_step * ALPHA / UNLABELED, rel=1e-12)
    assert first.satisfied == second.satisfied
    with pytest.raises(ValueError, match="lr is needed where rate is None"):
        training.condition(without, unlabeled)


def test_a_model_that_does_not_move(draw):
    """Where nothing moves the predictions any step will do."""
    training = Training(draw)
    for p in training.model.parameters():
        p.data.zero_()
    training.model.fc.bias.requires_grad_(False)
    training.model.fc.weight.requires_grad_(False)
    found = training.condition(MetaGradient(how="jvp", rate=ALPHA, step=1e6), training.make(UNLABELED))
    assert found == StepCondition(0.0, 0.0, math.inf, True)


def test_arguments_are_checked(draw):
    training = Training(draw)
    method, unlabeled = MetaGradient(how="jvp", rate=ALPHA), training.make(2)
    batch = {"model": training.model, "unlabeled": unlabeled, "holdout": training.x, "targets": training.y}
    with pytest.raises(ValueError, match="iterations must be an int >= 1, got 0"):
        method.step_condition(**batch, iterations=0)
    with pytest.raises(ValueError, match="alpha must be >= 0"):
        method.step_condition(**batch, lr=-1.0)
    with pytest.raises(ValueError, match=r"targets must have N = 8 like the rows of .* for holdout, got 7"):
        method.step_condition(**(batch | {"targets": training.y[1:]}))
    before = forward(training.model, unlabeled)
    random = torch.get_rng_state()
    method.step_condition(**batch)
    assert torch.equal(forward(training.model, unlabeled), before)
    assert torch.equal(random, torch.get_rng_state())
