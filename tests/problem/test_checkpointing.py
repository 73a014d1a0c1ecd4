"""Activation checkpointing in the model: every derivative equals the plain model's, or is refused."""

import warnings

import pytest
import torch
from model_checks import WAYS, assert_same_state, check_ways, direction_of, everything_about
from torch import nn
from torch.utils import checkpoint
from whole_model_nets import mlp, normal

import fastmeta
from fastmeta.problem.model_function import ModelFunction, Term


def reentrant(function, *args):
    return checkpoint.checkpoint(function, *args, use_reentrant=True)


def non_reentrant(function, *args):
    return checkpoint.checkpoint(function, *args, use_reentrant=False)


def in_segments(function, x):
    return checkpoint.checkpoint_sequential(list(function), 2, x, use_reentrant=True)


KINDS = (reentrant, non_reentrant, in_segments)


class Blocks(nn.Module):
    """Two blocks with dropout and batch statistics, the first of the inputs, which require no grad."""

    def __init__(self, run, generator):
        super().__init__()
        self.run = run
        self.first = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3))
        self.second = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh())
        self.fc = nn.Linear(6, 3)
        self.double()
        for parameter in self.parameters():
            parameter.data.copy_(normal(generator, *parameter.shape))

    def forward(self, x):
        return self.fc(self.run(self.second, self.run(self.first, x)))


def pair(run, generator):
    """The plain model and one with checkpoints, at the same parameters."""
    plain, model = Blocks(lambda function, x: function(x), generator), Blocks(run, generator)
    model.load_state_dict(plain.state_dict())
    return plain, model


@pytest.mark.parametrize("run", KINDS)
def test_every_derivative(run, generator):
    plain, model = pair(run, generator)
    x, v = normal(generator, 5, 4), direction_of(plain, generator)
    term = Term(x, lambda f: f.logsumexp(1).sum(), lambda f, z: f.softmax(1) * z)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "None of the inputs have requires_grad")  # of a reentrant checkpoint
        before = everything_about(model)
        for how in WAYS:
            expected = fastmeta.label_gradient(plain, x, v, how=how, radius=1e-5)
            torch.testing.assert_close(fastmeta.label_gradient(model, x, v, how=how, radius=1e-5), expected)
        results = [
            [function.gradient(x, term.loss)[0], function.hessian([term])(v), function.gauss_newton([term])(v)]
            for function in (ModelFunction(plain), ModelFunction(model))
        ]
        assert_same_state(before, everything_about(model))
    torch.testing.assert_close(results[1], results[0])
    assert min(value.norm() for vector in results[0] for name, value in vector.items() if name != "second.0.bias") > 0


@pytest.mark.parametrize("run", KINDS)
@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("mode", [None, "eval"])
def test_backward_of_the_step_itself(run, how, mode, generator):
    """It recomputes the blocks after refine has returned: in the mode of the evaluation, not in the model's."""
    models = pair(run, generator)
    x, y, u = normal(generator, 4, 4), torch.tensor([0, 1, 2, 0]), normal(generator, 5, 4)
    gradients = []
    for model in models:
        torch.manual_seed(0)
        method = fastmeta.L2I(how=how, radius=1e-4)
        method.mode = mode
        method.refine(model=model, unlabeled=u, holdout=x, targets=y).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert gradients[0][0].norm() > 0
    torch.testing.assert_close(*gradients)


def test_checkpoints_are_the_user_s_again_after_it(generator):
    """Also after an exception."""
    own = vars(checkpoint.CheckpointFunction).get("apply"), checkpoint._checkpoint_without_reentrant_generator
    model, _ = mlp(generator)
    with pytest.raises(RuntimeError):
        fastmeta.label_gradient(model, normal(generator, 2, 99), direction_of(model, generator))
    assert own == (vars(checkpoint.CheckpointFunction).get("apply"), checkpoint._checkpoint_without_reentrant_generator)


@pytest.mark.parametrize("how", WAYS)
def test_other_hooks_on_saved_tensors(how, generator):
    class Offloaded(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp(generator).model

        def forward(self, x):
            with torch.autograd.graph.save_on_cpu():
                return self.inner(x)

    model = Offloaded()
    x, v = normal(generator, 4, model.inner[0].in_features), direction_of(model, generator)
    check_ways(model, x, v)
    refined = fastmeta.L2I(how=how, radius=1e-4).refine(
        model=model, unlabeled=x, holdout=x, targets=torch.zeros(4, dtype=torch.int64)
    )
    plain = fastmeta.L2I(how=how, radius=1e-4).refine(
        model=model.inner, unlabeled=x, holdout=x, targets=torch.zeros(4, dtype=torch.int64)
    )
    got, expected = (torch.autograd.grad(each.loss, list(model.parameters())) for each in (refined, plain))
    torch.testing.assert_close(got, expected)


class ForeignCheckpoint(torch.autograd.Function):
    """As other libraries have it: runs a block without a graph, and calls backward later."""

    @staticmethod
    def forward(ctx, run, x):
        ctx.run, ctx.x = run, x.detach()
        return run(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.x.requires_grad_()
        with torch.enable_grad():
            y = ctx.run(x)
        torch.autograd.backward(y, grad)
        return None, x.grad


class Product(torch.autograd.Function):
    """Reads nothing but its arguments, and asks another parameter for its shape."""

    @staticmethod
    def forward(ctx, x, weight, layer):
        assert layer.bias.shape == (weight.shape[0],)
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.T @ x, None

    @staticmethod
    def jvp(ctx, dx, dweight, _):
        x, weight = ctx.saved_tensors
        return dx @ weight.T + x @ dweight.T


def test_function_that_reads_parameters_unseen(generator):
    _, model = pair(ForeignCheckpoint.apply, generator)
    x, y, v = normal(generator, 5, 4), torch.tensor([0, 1, 2, 0, 1]), direction_of(model, generator)
    before = everything_about(model)
    for how in WAYS[:2]:
        with pytest.raises(NotImplementedError, match=r"ForeignCheckpoint reads a tensor .* use_reentrant=False"):
            fastmeta.label_gradient(model, x, v, how=how)
    with pytest.raises(NotImplementedError, match="ForeignCheckpoint reads"):
        ModelFunction(model).gradient(x, torch.sum)
    with pytest.raises(NotImplementedError, match="ForeignCheckpoint reads"):
        fastmeta.L2I(how="finite_difference").refine(model=model, unlabeled=x, holdout=x, targets=y)
    assert_same_state(before, everything_about(model))
    plain, _ = pair(ForeignCheckpoint.apply, generator)
    plain.run = lambda function, x: function(x)
    plain.load_state_dict(model.state_dict())
    for how in WAYS[2:]:
        expected = fastmeta.label_gradient(plain, x, v, how=how)
        torch.testing.assert_close(fastmeta.label_gradient(model, x, v, how=how), expected)
    # Nothing that moves is read there.
    last = {name: value for name, value in v.items() if name.startswith("fc")}
    torch.testing.assert_close(fastmeta.label_gradient(model, x, last), fastmeta.label_gradient(plain, x, last))


def test_function_that_reads_its_arguments(generator):
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    model[0].forward = lambda x: Product.apply(x, model[0].weight, model[0])
    model[0].weight = nn.Parameter(normal(generator, 6, 4))
    check_ways(model, normal(generator, 5, 4), direction_of(model, generator, names=("0.weight", "2.weight")))
