"""A model that changes its inputs in place gets the same ones in every pass, and the caller's stay as they are."""

from collections import UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from model_checks import WAYS, direction_of
from torch import nn
from whole_model_nets import normal

import fastmeta
from fastmeta.problem.input_copies import InputCopies
from fastmeta.problem.model_function import ModelFunction

Named = namedtuple("Named", "x length")


@dataclass(frozen=True)
class Held:
    x: torch.Tensor
    length: int


class Batch:
    """Of another library, which knows how to copy it."""

    def __init__(self, x):
        self.graph = {"x": x}

    def clone(self):
        return Batch(self.graph["x"].clone())


class Opaque:
    def __init__(self, x):
        self.x = x


CONTAINERS = {
    "tensor": (lambda x: x, lambda given: given),
    "list": (lambda x: ([[x], 2],), lambda given: given[0][0]),
    "dict": (lambda x: ({"of": {"x": x}},), lambda given: given["of"]["x"]),
    "mapping": (lambda x: (UserDict(x=x),), lambda given: given["x"]),
    "named": (lambda x: (Named(x, 2),), lambda given: given.x),
    "dataclass": (lambda x: (Held(x, 2),), lambda given: given.x),
    "clone": (lambda x: (Batch(x),), lambda given: given.graph["x"]),
    "twice": (lambda x: ((x, x),), lambda given: given[1] - 0 * given[0]),
    "keyword": (lambda x: {"given": (x,)}, lambda given: given[0]),
}


class InPlace(nn.Module):
    def __init__(self, find, frozen, generator):
        super().__init__()
        self.a, self.fc, self.find = nn.Linear(4, 6), nn.Linear(6, 3), find
        self.double().a.requires_grad_(not frozen)
        for parameter in self.parameters():
            parameter.data.copy_(normal(generator, *parameter.shape))

    def forward(self, given):
        x = self.find(given)
        x.sub_(0.5).div_(0.2)
        return self.fc(self.a(x).tanh())


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("inference", [False, True])
def test_every_pass_sees_the_same_inputs(container, frozen, inference, generator):
    put, find = CONTAINERS[container]
    model = InPlace(find, frozen, generator)
    with torch.inference_mode(inference):
        x = normal(generator, 5, 4)
        if container == "twice":
            model.find = lambda given: given[1].sub_(given[1] - given[0])  # 0 where both are one tensor
        inputs, before = put(x), x.clone()
    v = direction_of(model, generator)
    with torch.no_grad():
        h = model.a((before - 0.5) / 0.2).tanh()
    plain = nn.Sequential(model.fc)
    of_plain = {name.replace("fc", "0"): value for name, value in v.items() if name.startswith("fc")}
    results = [fastmeta.label_gradient(model, inputs, v, how=how, radius=1e-5) for how in WAYS]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ModelFunction(model).logits(inputs), plain(h).detach())
    if frozen:
        torch.testing.assert_close(results[0], fastmeta.label_gradient(plain, h, of_plain))
    torch.testing.assert_close(x, before, rtol=0, atol=0)


@pytest.mark.parametrize("how", WAYS)
def test_methods(how, generator):
    """Their several passes, and the step's own backward."""
    model = InPlace(lambda given: given, False, generator)
    x, y = normal(generator, 5, 4), torch.tensor([0, 1, 2, 0, 1])
    before = x.clone()
    results = []
    for model.find in (lambda given: given, torch.clone):
        model.zero_grad()
        refined = fastmeta.L2I(how=how).refine(model=model, unlabeled=x, holdout=x, targets=y)
        refined.loss.backward()
        results.append([refined.labels, *(parameter.grad for parameter in model.parameters())])
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(x, before, rtol=0, atol=0)


def test_what_cannot_be_copied(generator):
    """Goes to the model itself, which may read it."""
    model = InPlace(lambda given: given.x, False, generator)
    x, v = normal(generator, 5, 4), direction_of(model, generator)
    for how in WAYS:
        with pytest.raises(ValueError, match=r"model must not change its inputs in place, .* Opaque.x"):
            fastmeta.label_gradient(model, (Opaque(x),), v, how=how)
        nested = Opaque({"parts": [x]})
        model.find = lambda given: given.x["parts"][0]
        with pytest.raises(ValueError, match=r"it changed Opaque.x\['parts'\]\[0\]"):
            fastmeta.label_gradient(model, nested, v, how=how)
        model.find = lambda given: given.x
    model.find = lambda given: given.x.clone()
    got = fastmeta.label_gradient(model, (Opaque(x),), v)
    model.find = lambda given: given
    torch.testing.assert_close(got, fastmeta.label_gradient(model, x, v))


def test_numpy(generator):
    model = InPlace(lambda given: torch.from_numpy(given).mul_(2), False, generator)
    x, v = normal(generator, 5, 4), direction_of(model, generator)
    array = x.clone().numpy()
    results = [fastmeta.label_gradient(model, array, v, how=how, radius=1e-5) for how in WAYS]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-3, atol=1e-3)
    assert (array == x.numpy()).all()


def test_an_iterator_is_used_up_by_one_pass(generator):
    model = InPlace(lambda given: torch.stack(list(given)), False, generator)
    v = direction_of(model, generator)
    with pytest.raises(
        TypeError, match="inputs must be there for several passes, got generator, an iterator; use a list"
    ):
        fastmeta.label_gradient(model, (row for row in normal(generator, 5, 4)), v)


def test_logits_of_pixels(generator):
    model = nn.Conv2d(2, 3, 1).double()
    v = {"weight": normal(generator, 3, 2, 1, 1)}
    with pytest.raises(ValueError, match=r"logits \[N, C\] or \[B, T, C\], got \[4, 3, 3, 3\]; give those of pixels"):
        fastmeta.label_gradient(model, normal(generator, 4, 2, 3, 3), v)


def test_gradients_go_through_a_copy(generator):
    """Where the logits stay on the graph, they do on that of the inputs, too."""
    x = normal(generator, 5, 4).requires_grad_()
    model = InPlace(lambda given: given, False, generator)
    ModelFunction(model).logits(x, on_graph=True).sum().backward()
    assert x.grad.norm() > 0
    copied = InputCopies(on_graph=False)(x)
    assert not copied.requires_grad


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).view(2, 3).T,
        torch.arange(12.0).view(3, 4)[:, ::2],
        torch.ones(3, 1).expand(3, 4),
        torch.eye(3).to_sparse(),
        torch.eye(3).to_sparse_csr(),
        torch.tensor([True, False]),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_any_tensor(tensor):
    copied = InputCopies(on_graph=False)(tensor)
    assert copied is not tensor
    assert copied.layout == tensor.layout
    dense = (copied, tensor) if tensor.layout == torch.strided else (copied.to_dense(), tensor.to_dense())
    torch.testing.assert_close(*dense, rtol=0, atol=0)
