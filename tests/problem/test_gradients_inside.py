"""Models that work with gradients themselves: every way gives the derivative of what they compute, or refuses."""

import pytest
import torch
from model_checks import WAYS, assert_same_state, check_ways, direction_of, everything_about
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from whole_model_nets import normal

import fastmeta
from fastmeta.problem.model_function import ModelFunction, Term


class Net(nn.Module):
    def __init__(self, features, generator):
        super().__init__()
        self.a, self.b, self.fc, self.features = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3), features
        self.double()
        for parameter in self.parameters():
            parameter.data.copy_(normal(generator, *parameter.shape))

    def forward(self, x):
        return self.fc(self.features(self, x))


def energy(m, x):
    """Its force: a gradient with a graph."""
    with torch.enable_grad():
        x = x.requires_grad_()
        force = torch.autograd.grad(m.b(m.a(x).tanh()).square().sum(), x, create_graph=True)[0]
    return functional.pad(force, (0, 2)).tanh()


def functional_energy(m, x):
    force = torch.func.grad(lambda row: m.b(m.a(row).tanh()).square().sum())(x)
    return functional.pad(force, (0, 2)).tanh()


def each_row(m, x):
    return torch.func.vmap(lambda row: m.b(m.a(row).tanh()).tanh())(x)


def other_weights(m, x):
    weights = {name: 2 * value for name, value in m.a.named_parameters()}
    return m.b(torch.func.functional_call(m.a, weights, (x,)).tanh()).tanh()


def in_place(m, x):
    h = m.a(x).clone()
    h[:, 0] = 0.5
    h[:, 3:5].tanh_()
    written = torch.empty_like(h)
    written[:] = h
    return m.b(written).tanh_()


def complex_numbers(m, x):
    return torch.fft.fft(m.b(m.a(x).tanh())).abs()


def one_module_twice(m, x):
    return m.b(m.b(m.a(x)).tanh()).tanh()


@pytest.mark.parametrize(
    "features",
    [energy, functional_energy, each_row, other_weights, in_place, complex_numbers, one_module_twice],
)
def test_every_way(features, generator):
    model = Net(features, generator)
    x, v, y = normal(generator, 5, 4), direction_of(model, generator), torch.tensor([0, 1, 2, 0, 1])
    check_ways(model, x, v, ways=WAYS[:2] if features is energy else WAYS)
    gradients = []
    for how in WAYS[:2]:
        loss = fastmeta.L2I(how=how).refine(model=model, unlabeled=x, holdout=x, targets=y).loss
        gradients.append(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("how", WAYS)
def test_hooks_of_a_backward_pass(how, generator):
    """They have no forward mode, but run where there is a backward pass: with a graph of the logits."""
    model, plain = Net(one_module_twice, generator), Net(one_module_twice, generator)
    plain.load_state_dict(model.state_dict())
    calls = []
    model.b.register_full_backward_hook(lambda *_: calls.append(None))
    model.b.register_forward_hook(lambda module, inputs, output: 2 * output)
    plain.b.register_forward_hook(lambda module, inputs, output: 2 * output)
    x, v, y = normal(generator, 5, 4), direction_of(model, generator), torch.tensor([0, 1, 2, 0, 1])
    got, expected = (fastmeta.label_gradient(net, x, v, how=how) for net in (model, plain))
    torch.testing.assert_close(got, expected)
    gradients = []
    for net in (model, plain):
        loss = fastmeta.L2I(how=how).refine(model=net, unlabeled=x, holdout=x, targets=y).loss
        calls.clear()
        gradients.append(torch.autograd.grad(loss, list(net.parameters())))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("how", WAYS)
def test_backward_inside_of_the_model(how, generator):
    """It adds to ``.grad`` of the parameters of the pass, not to the caller's."""

    def features(m, x):
        with torch.enable_grad():
            inner = torch.zeros(len(x), 6, dtype=x.dtype, requires_grad=True)
            (m.b(m.a(x) + inner)).square().sum().backward()
        return inner.grad.tanh()

    model = Net(features, generator)
    x, y = normal(generator, 5, 4), torch.tensor([0, 1, 2, 0, 1])
    model.a.weight.grad = torch.ones_like(model.a.weight)
    before = everything_about(model)
    fastmeta.label_gradient(model, x, direction_of(model, generator), how=how)
    fastmeta.L2I(how=how).refine(model=model, unlabeled=x, holdout=x, targets=y)
    assert_same_state(before, everything_about(model))


class Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


class Once(Sine):
    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


class WithoutGraph(Sine):
    @staticmethod
    def backward(ctx, grad):
        with torch.no_grad():
            return grad * ctx.saved_tensors[0].cos()


def test_backward_that_cannot_be_differentiated(generator):
    model = Net(lambda m, x: Sine.apply(m.a(x)), generator)
    x, v = normal(generator, 5, 4), direction_of(model, generator, names=("a.weight", "fc.weight"))
    expected = {how: fastmeta.label_gradient(model, x, v, how=how) for how in WAYS[1:]}
    torch.testing.assert_close(expected["finite_difference"], expected["double_backward"], rtol=1e-3, atol=1e-3)
    term = Term(x, lambda f: f.logsumexp(1).sum())
    gradient = ModelFunction(model).gradient(x, term.loss)[0]
    for cut in (Once, WithoutGraph):
        model.features = lambda m, x, cut=cut: cut.apply(m.a(x))
        match = f"differentiate twice, but the backward of the torch.autograd.Function {cut.__name__} can"
        with pytest.raises(NotImplementedError, match=match):
            fastmeta.label_gradient(model, x, v, how="double_backward")
        with pytest.raises(NotImplementedError, match=match):
            ModelFunction(model).hessian([term])(v)
        torch.testing.assert_close(ModelFunction(model).gradient(x, term.loss)[0], gradient)
        for how in WAYS[2:]:
            torch.testing.assert_close(fastmeta.label_gradient(model, x, v, how=how), expected[how])


@pytest.mark.parametrize("by_method", [True, False])
def test_requires_grad_is_turned_off_inside(by_method, generator):
    """A constant from there on, which a tangent would not become."""

    def features(m, x):
        if by_method:
            m.b.requires_grad_(False)
        else:
            m.b.weight.requires_grad = m.b.bias.requires_grad = False
        h = m.b(m.a(x).tanh())
        m.b.requires_grad_()
        return h

    model, plain = Net(features, generator), Net(lambda m, x: m.b(m.a(x).tanh()), generator)
    plain.load_state_dict(model.state_dict())
    x, v = normal(generator, 5, 4), direction_of(model, generator)
    with pytest.raises(NotImplementedError, match="requires_grad is turned off inside of the model"):
        fastmeta.label_gradient(model, x, v)
    moving = {name: value for name, value in v.items() if not name.startswith("b.")}
    got, expected = (
        fastmeta.label_gradient(model, x, v, how="double_backward"),
        fastmeta.label_gradient(plain, x, moving),
    )
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(fastmeta.label_gradient(model, x, moving), expected)


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_embedding_bag(mode, sparse, weighted, generator):
    """Forward mode, which PyTorch has not for it; twice it cannot be differentiated."""

    class Bags(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag, self.fc = nn.EmbeddingBag(9, 6, mode=mode, sparse=sparse, padding_idx=0), nn.Linear(6, 3)

        def forward(self, tokens, offsets):
            weights = torch.linspace(0, 1, len(tokens), dtype=torch.float64) if weighted and mode == "sum" else None
            return self.fc(self.bag(tokens, offsets, per_sample_weights=weights).tanh())

    model = Bags().double()
    inputs = torch.randint(9, (12,), generator=generator), torch.tensor([0, 3, 3, 7])
    v = direction_of(model, generator)
    got = fastmeta.label_gradient(model, inputs, v)
    for how in WAYS[2:]:
        difference = fastmeta.label_gradient(model, inputs, v, how=how, radius=1e-5)
        torch.testing.assert_close(got, difference, rtol=1e-3, atol=1e-4)
    with pytest.raises(NotImplementedError, match="_embedding_bag_backward"):
        fastmeta.label_gradient(model, inputs, v, how="double_backward")
