"""No evaluation of a model leaves a trace, and every one sees the same randomness."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.distributed
from model_checks import EXACT, WAYS, assert_same_state, direction_of, everything_about
from torch import nn
from whole_model_nets import NETS, conv_net, mlp, normal

import fastmeta
from fastmeta.problem.model_function import ModelFunction
from fastmeta.problem.random_state import RandomState


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("train", [True, False])
def test_leaves_no_trace(name, how, train, generator):
    model, make_inputs = NETS[name](generator)
    model.train(train)
    inputs, v = make_inputs(4), direction_of(model, generator)
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    targets = torch.zeros(4, dtype=torch.int64)
    before = everything_about(model)
    labels = fastmeta.label_gradient(model, inputs, v, how=how)
    weights = fastmeta.example_weight_gradient(model, inputs, targets, v, how=how)
    assert_same_state(before, everything_about(model))
    assert labels.shape == (4, 3)
    assert weights.shape == (4,)
    assert not labels.requires_grad
    assert not weights.requires_grad


class Fails(nn.Module):
    """Raises in the nth forward, having drawn random numbers and updated a buffer."""

    def __init__(self, at):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
        self.left = itertools.count(at - 1, -1)  # an int would be put back after each pass

    def forward(self, x):
        y = self.layer(x)
        if next(self.left) == 0:
            raise ArithmeticError("on purpose")
        return y


@pytest.mark.parametrize(("how", "at"), [*((how, 1) for how in WAYS), *((how, 2) for how in WAYS[2:])])
def test_leaves_no_trace_where_the_model_raises(how, at, generator):
    model = Fails(at).double()
    v, x = direction_of(model, generator), normal(generator, 5, 4)
    before = everything_about(model)
    with pytest.raises(ArithmeticError):
        fastmeta.label_gradient(model, x, v, how=how)
    assert_same_state(before, everything_about(model))


def test_mode_of_the_evaluations_alone(generator):
    """Also of a module that does more than set a flag, and that keeps a part in another mode."""

    class Counting(nn.Sequential):
        merged = False

        def train(self, mode=True):
            super().train(mode)
            self.merged = not mode
            return self

        def forward(self, x):
            assert self.merged == (not self.training)
            return super().forward(x)

    model = Counting(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).double()
    model[1].eval()
    x, before = normal(generator, 5, 4), everything_about(model)
    got = ModelFunction(model, mode="eval").logits(x)
    assert_same_state(before, everything_about(model))
    assert not model.merged
    torch.testing.assert_close(got, model.eval()(x))


@pytest.mark.parametrize("how", WAYS)
def test_same_dropout_mask_in_every_evaluation(how, generator):
    """The one that the model draws next. Dropout is linear here, so a difference is as exact as the rest."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    x, v = normal(generator, 7, 6), direction_of(model, generator, names=("2.weight",))
    torch.manual_seed(3)
    got = fastmeta.label_gradient(model, x, v, loss="mse", how=how)
    mask = nn.Dropout(0.5)(torch.ones(7, 8, dtype=torch.float64))
    torch.testing.assert_close(got, 2 * (model[0](x) * mask) @ v["2.weight"].T, rtol=1e-6, atol=1e-6)


def test_one_function_draws_one_mask(generator):
    """That of the moment it was made at, whatever is drawn in between."""
    model, make_inputs = conv_net(generator, dropout=0.5)
    x, v = make_inputs(4), direction_of(model, generator)
    torch.manual_seed(2)
    function = ModelFunction(model)
    logits = []
    for evaluation in (
        lambda: function.logits(x),
        lambda: function.jvp(x, v)[0],
        lambda: function.gradient(x, torch.sum)[1],
        lambda: function.outputs(x).logits,
        lambda: function.logits(x, on_graph=True),
    ):
        torch.rand(3)
        logits.append(evaluation())
    torch.manual_seed(2)
    expected = model(x)
    for got in logits:
        torch.testing.assert_close(got, expected)


def test_random_state_of_the_gpus(monkeypatch):
    """Every device among the model's once, and none that is not CUDA."""
    states = {torch.device("cuda", 0): torch.tensor([1]), torch.device("cuda", 1): torch.tensor([2])}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[device].clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update({device: state}))
    saved = RandomState([*states, torch.device("cpu")])
    before = torch.rand(2)
    states.update({device: state + 5 for device, state in states.items()})
    saved.restore()
    assert [int(state) for state in states.values()] == [1, 2]
    torch.testing.assert_close(torch.rand(2), before, rtol=0, atol=0)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_any_caller(how, context, generator):
    """Also with inputs made in inference mode, and the result can be used outside."""
    model, make_inputs = conv_net(generator)
    with context():
        x = make_inputs(4)
        v = direction_of(model, generator)
        torch.manual_seed(0)
        got = fastmeta.label_gradient(model, x, v, how=how)
    torch.manual_seed(0)
    expected = fastmeta.label_gradient(model, x.clone(), {n: t.clone() for n, t in v.items()}, how=how)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    (got * torch.ones(1, requires_grad=True)).sum().backward()


@pytest.mark.parametrize("how", EXACT)
def test_inputs_and_direction_on_a_graph(how, generator):
    model, make_inputs = mlp(generator)
    x, v = make_inputs(4), direction_of(model, generator)
    expected = fastmeta.label_gradient(model, x, v, how=how)
    got = fastmeta.label_gradient(
        model, x.clone().requires_grad_(), {n: t.clone().requires_grad_() for n, t in v.items()}, how=how
    )
    assert not got.requires_grad
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("how", WAYS)
def test_keeps_activations_for_double_backward_alone(how, generator):
    """So that the others need the memory of a forward pass, also where inputs require grad."""
    model, make_inputs = conv_net(generator)
    x, v, saved = make_inputs(4).requires_grad_(), direction_of(model, generator), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(1) or tensor, lambda tensor: tensor):
        fastmeta.label_gradient(model, x, v, how=how)
    assert bool(saved) == (how == "double_backward")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_dtypes_and_layouts(dtype, memory_format, generator):
    model, make_inputs = conv_net(generator, dropout=0.0)
    x, v = make_inputs(6), direction_of(model, generator)
    expected = fastmeta.label_gradient(model, x, v)
    model = model.to(dtype).to(memory_format=memory_format)
    v = {n: t.to(dtype).to(memory_format=memory_format) if t.dim() == 4 else t.to(dtype) for n, t in v.items()}
    x = x.to(dtype).to(memory_format=memory_format)
    bound = {torch.float32: 1e-4, torch.bfloat16: 0.3, torch.float64: 1e-12}[dtype]
    for how in EXACT:
        got = fastmeta.label_gradient(model, x, v, how=how)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert (got - expected).norm() <= bound * expected.norm(), how


@pytest.mark.parametrize("name", NETS)
def test_moved_parameters(name, generator):
    """At other parameters than the model's own: as if the model had these."""
    model, make_inputs = NETS[name](generator)
    model.eval()
    x, v, step = make_inputs(4), direction_of(model, generator), direction_of(model, generator)
    function = ModelFunction(model)
    theta = {n: p - 0.1 * step[n] for n, p in function.parameters.items()}

    def everything(function, parameters):
        product = function.hessian([term], parameters)
        gauss_newton = function.gauss_newton([term], parameters)
        return [
            function.logits(x, parameters),
            function.jvp(x, v, parameters)[1],
            function.gradient(x, term.loss, parameters)[0],
            product(v),
            gauss_newton(v),
        ]

    term = SimpleNamespace(inputs=x, loss=lambda f: f.logsumexp(1).sum(), curvature=lambda f, z: f.softmax(1) * z)
    got = everything(function, theta)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name in theta:
                parameter.copy_(theta[parameter_name])
    torch.testing.assert_close(got, everything(ModelFunction(model), None))
    assert all(float(t.norm()) > 0 for t in (got[1], got[3]["fc.weight"], got[4]["fc.weight"]))


def test_hooks_run_in_every_evaluation(generator):
    """Documented: their state is the model's own."""
    model, make_inputs = mlp(generator)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    v = direction_of(model, generator)
    for how, count in (("jvp", 1), ("double_backward", 1), ("finite_difference", 2), ("forward_difference", 2)):
        calls.clear()
        fastmeta.label_gradient(model, make_inputs(2), v, how=how)
        assert len(calls) == count, how
