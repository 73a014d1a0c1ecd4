"""Whatever a model holds is as before after every evaluation, and every pass starts from the same."""

import random
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from model_checks import WAYS, assert_same_state, by_definition, direction_of, everything_about
from torch import nn
from whole_model_nets import mlp, normal

import fastmeta
from fastmeta.problem.model_function import ModelFunction

Pair = namedtuple("Pair", "mean count")


class Stateful(nn.Module):
    """Adds a number to the features, which depends on all of its state, and changes the state."""

    def __init__(self, update, generator, **state):
        super().__init__()
        self.a, self.fc, self.update = nn.Linear(4, 6), nn.Linear(6, 3), update
        self.double()
        for parameter in self.parameters():
            parameter.data.copy_(normal(generator, *parameter.shape))
        for name, value in state.items():
            setattr(self, name, value)

    def forward(self, x):
        h = self.a(x).tanh()
        return self.fc(h + self.update(self, h.detach().mean(0)))


def none_buffer(m, mean):
    m.running = mean if m.running is None else m.running + mean
    return m.running


def new_buffer(m, mean):
    if not hasattr(m, "made"):
        m.register_buffer("made", torch.zeros_like(mean))
    m.made += 1
    return m.made


def deleted_buffer(m, mean):
    last = m.once if hasattr(m, "once") else torch.ones_like(mean)
    if hasattr(m, "once"):
        del m.once
    return last


def in_place_attribute(m, mean):
    m.held.mul_(0.5).add_(1.0)
    return m.held


def new_attribute(m, mean):
    m.count += 1
    m.last = mean
    return m.count


def in_a_dict(m, mean):
    m.table["mean"].add_(1.0)
    m.table["calls"] += 1
    m.table[m.table["calls"]] = mean
    return m.table["mean"] * len(m.table)


def in_lists(m, mean):
    m.history.append(mean)
    m.nested[0][0].add_(len(m.history))
    return m.nested[0][0]


def in_a_tuple(m, mean):
    m.pair.mean.add_(1.0)
    m.pair = Pair(m.pair.mean, m.pair.count + 1)
    return m.pair.mean * m.pair.count


def torch_generator(m, mean):
    return torch.randn(6, generator=m.noise, dtype=torch.float64)


def numpy_generator(m, mean):
    return float(m.rng.standard_normal()) + float(m.legacy.randn())


def python_random(m, mean):
    return random.gauss(0, 1) + m.own.gauss(0, 1)


def numpy_random(m, mean):
    return float(np.random.randn())


def states():
    """Update and state; made anew for every test."""
    ones = lambda: torch.ones(6, dtype=torch.float64)  # noqa: E731
    return {
        "none_buffer": (none_buffer, {"running": None}),
        "new_buffer": (new_buffer, {}),
        "deleted_buffer": (deleted_buffer, {"once": ones()}),
        "in_place_attribute": (in_place_attribute, {"held": ones()}),
        "new_attribute": (new_attribute, {"count": 0}),
        "in_a_dict": (in_a_dict, {"table": OrderedDict(mean=ones(), calls=0)}),
        "in_lists": (in_lists, {"history": [], "nested": [[ones()], 1]}),
        "in_a_tuple": (in_a_tuple, {"pair": Pair(ones(), 0)}),
        "torch_generator": (torch_generator, {"noise": torch.Generator().manual_seed(3)}),
        "numpy_generator": (
            numpy_generator,
            {"rng": np.random.default_rng(3), "legacy": np.random.RandomState(3)},
        ),
        "python_random": (python_random, {"own": random.Random(3)}),
        "numpy_random": (numpy_random, {}),
    }


def make(name, generator):
    update, state = states()[name]
    buffers = {key: state.pop(key) for key in ("running", "once") if key in state}
    model = Stateful(update, generator, **state)
    for key, value in buffers.items():
        model.register_buffer(key, value)
    return model


@pytest.mark.parametrize("name", states())
def test_as_before_and_the_same_in_every_pass(name, generator):
    """Two models of one state, of which one has been evaluated, go on alike."""
    model, other = make(name, generator), make(name, generator)
    other.load_state_dict({key: value.clone() for key, value in model.state_dict().items()})
    x, v = normal(generator, 5, 4), direction_of(model, generator)
    for first in (np.random.randn, np.random.rand):  # with a second normal number kept, and without
        first()
        states_before = random.getstate(), np.random.get_state()
        results = [fastmeta.label_gradient(model, x, v, how=how, radius=1e-6) for how in WAYS]
        gradients = [ModelFunction(model).gradient(x, lambda f: f.square().sum()) for _ in range(2)]
        assert random.getstate() == states_before[0]
        assert repr(np.random.get_state()) == repr(states_before[1])
        torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)
        torch.testing.assert_close(results[1], results[0])
        # A pass starts from other means where the differences move the parameters, if only in what is no constant.
        bound = 1e-4 if name not in ("none_buffer", "new_attribute", "in_a_dict", "in_lists") else float("inf")
        assert max((result - results[0]).norm() for result in results[2:]) <= bound
    assert vars(model).keys() == vars(other).keys()
    assert list(model.state_dict()) == list(other.state_dict())
    assert list(model._buffers) == list(other._buffers)
    for _ in range(3):
        random.setstate(states_before[0])
        np.random.set_state(states_before[1])
        expected = other(x)
        random.setstate(states_before[0])
        np.random.set_state(states_before[1])
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("how", WAYS)
def test_attributes_of_the_caller_s_own_forward(how, generator):
    """What the model's last forward left, on its graph, is still there."""

    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp(generator).model
            self.inner.register_forward_hook(lambda module, inputs, output: setattr(module, "seen", output))

        def forward(self, x):
            self.penalty = self.inner[0].weight.square().sum()
            return self.inner(x)

    model = Keeps()
    x = normal(generator, 4, model.inner[0].in_features)
    model(x)
    penalty, seen = model.penalty, model.inner.seen
    fastmeta.label_gradient(model, x, direction_of(model, generator), how=how)
    assert model.penalty is penalty
    assert model.inner.seen is seen
    (penalty + seen.sum()).backward()
    assert model.inner[0].weight.grad.norm() > 0


@pytest.mark.parametrize("place", ["list", "dict", "tuple", "nested"])
@pytest.mark.parametrize("how", WAYS)
def test_parameters_that_are_read_from_containers(place, how, generator):
    """Registered, but read from a list of the module: they move there, too."""

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.fc = nn.Linear(4, 4), nn.Linear(4, 3)
            w, b = self.inner.weight, self.inner.bias
            self.held = {"list": [w, b], "dict": {0: w, 1: b}, "tuple": (w, b), "nested": [([w],), (b,)]}[place]

        def forward(self, x):
            w, b = self.held[0], self.held[1]
            w, b = (w[0][0], b[0]) if place == "nested" else (w, b)
            return self.fc((x @ w.T + b).tanh())

    model = Reads().double()
    plain = nn.Sequential(OrderedDict(inner=model.inner, act=nn.Tanh(), fc=model.fc))
    x, v = normal(generator, 5, 4), direction_of(model, generator)
    held = model.held
    for _ in range(2):
        got = fastmeta.label_gradient(model, x, v, how=how, radius=1e-5)
        torch.testing.assert_close(got, fastmeta.label_gradient(plain, x, v, how=how, radius=1e-5))
    gradients = [ModelFunction(each).gradient(x, lambda f: f.square().sum())[0] for each in (model, plain)]
    torch.testing.assert_close(*gradients)
    assert model.held is held


def hidden_attribute(model):
    model.scale = torch.ones(3, dtype=torch.float64, requires_grad=True)


def hidden_in_a_list(model):
    model.scales = [torch.ones(3), torch.ones(3, requires_grad=True)]


def hidden_in_a_dict(model):
    model.scales = {"of": (torch.ones(3, requires_grad=True),)}


def hidden_module(model):
    model.layers = [nn.Linear(2, 2)]


def hidden_buffer(model):
    model.register_buffer("scale", torch.ones(3, requires_grad=True))


@pytest.mark.parametrize(
    ("hide", "name"),
    [
        (hidden_attribute, r"scale \[3\]"),
        (hidden_in_a_list, r"scales\[1\] \[3\]"),
        (hidden_in_a_dict, r"scales\['of'\]\[0\] \[3\]"),
        (hidden_module, r"layers\[0\].weight \[2, 2\]"),
        (hidden_buffer, r"scale \[3\]"),
    ],
)
def test_parameters_outside_of_named_parameters(hide, name, generator):
    model, make_inputs = mlp(generator)
    hide(model.fc)
    with pytest.raises(ValueError, match=rf"fc\.{name} requires grad and is not among .* nn.ParameterList"):
        fastmeta.label_gradient(model, make_inputs(2), direction_of(model, generator))


def test_frozen_teacher_in_a_list(generator):
    """Its statistics are state like the model's own, and a way back to the model is no hidden part."""

    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.fc = nn.Linear(4, 5), nn.Linear(5, 3)
            self.teacher = [nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5)).requires_grad_(False)]
            self.inner.root = [self]

        def forward(self, x):
            return self.fc(self.inner(x).tanh() + self.teacher[0](x))

    model = Student().double()
    model.teacher[0].double()
    x = normal(generator, 6, 4)
    before = {name: value.clone() for name, value in model.teacher[0].state_dict().items()}
    v = direction_of(model, generator)
    results = [fastmeta.label_gradient(model, x, v, how=how, radius=1e-5) for how in WAYS]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dict(model.teacher[0].state_dict()), before, rtol=0, atol=0)
    fastmeta.label_gradient(model.inner, x, direction_of(model.inner, generator))


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
def test_old_style_normalizations(norm, train, generator):
    """They set the weight as an attribute before each forward, and one of them moves buffers in place."""
    model, make_inputs = mlp(generator)
    getattr(nn.utils, norm)(model[0])
    model.train(train)
    x, v = make_inputs(5), direction_of(model, generator)
    model(x)
    weight, before = model[0].weight, everything_about(model)
    results = [fastmeta.label_gradient(model, x, v, loss="mse", how=how, radius=1e-5) for how in WAYS]
    assert model[0].weight is weight
    assert_same_state(before, everything_about(model))
    other, _ = mlp(generator)
    getattr(nn.utils, norm)(other[0])
    other.load_state_dict(model.state_dict())
    expected = by_definition(other.train(train), x, v)
    for result in results[:2]:
        torch.testing.assert_close(result, expected)
    if norm == "weight_norm" or not train:  # a power iteration is a constant, but differences move it
        central, forward = ((result - results[0]).norm() / results[0].norm() for result in results[2:])
        assert central <= 1e-7  # of order radius^2, and rounding
        assert forward <= 1e-4  # of order radius


def test_sparse_gradients(generator):
    """Of embeddings: dense where they become a direction."""
    results = []
    tokens, targets = torch.randint(9, (4, 5), generator=generator), torch.tensor([0, 1, 2, 0])
    start = None
    for sparse in (False, True):
        model = nn.Sequential(nn.Embedding(9, 2, sparse=sparse), nn.Flatten(), nn.Tanh(), nn.Linear(10, 3)).double()
        start = start or {name: normal(generator, *p.shape) for name, p in model.named_parameters()}
        model.load_state_dict(start)
        found = [ModelFunction(model).gradient(tokens, lambda f: f.square().sum())[0]]
        for how in WAYS:
            methods = (
                fastmeta.L2I(how=how, look_ahead=fastmeta.directions.LookAhead(steps=2)),
                fastmeta.MetaGradient(how=how),
                fastmeta.ExampleWeights(4, how=how, inverse_hessian="cg"),
                fastmeta.AlignedImputation(how=how),
            )
            for method in methods:
                refined = method.refine(
                    model=model, unlabeled=tokens, holdout=tokens, targets=targets, index=torch.arange(4)
                )
                found.append((refined.labels, refined.weights))
        results.append(found)
    torch.testing.assert_close(results[1], results[0])


class Elsewhere:
    """No module, so that its parameter is no one's."""

    def __init__(self):
        self.scale = nn.Parameter(torch.full((6,), 2.0, dtype=torch.float64))


@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize("how", WAYS[:2])
def test_parameters_from_elsewhere(how, registered, generator):
    """From a closure or an object: it would stay where it is; where it is a constant, it may."""
    held = Elsewhere()
    model = Stateful(lambda m, mean: held.scale, generator)
    if registered:
        model.scale = held.scale
    x, v = normal(generator, 5, 4), direction_of(model, generator)
    with pytest.raises(ValueError, match=r"its output depends on one \[6\] that it has from elsewhere"):
        fastmeta.label_gradient(model, x, v, how=how)
    with pytest.raises(ValueError, match="from elsewhere"):
        ModelFunction(model).gradient(x, torch.sum)
    model.update = lambda m, mean: held.scale.detach()
    assert fastmeta.label_gradient(model, x, v, how=how).norm() > 0


def test_parameters_that_the_model_changes(generator):
    """Theta would be another in each pass."""

    def normalize(m, mean):
        with torch.no_grad():
            m.a.weight.div_(m.a.weight.norm())
        return mean

    model = Stateful(normalize, generator)
    x, v = normal(generator, 5, 4), direction_of(model, generator)
    for how in WAYS:
        with pytest.raises(ValueError, match=r"must not change its parameters .* changed a.weight"):
            fastmeta.label_gradient(model, x, v, how=how)
