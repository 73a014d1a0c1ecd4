"""Models, inputs and directions that whole-model derivatives take, and those that they refuse."""

from collections import UserDict
from types import SimpleNamespace

import pytest
import torch
import torch.distributed
from model_checks import WAYS, assert_same_state, direction_of, everything_about
from torch import nn
from whole_model_nets import mlp, normal, tied_net

import fastmeta
from fastmeta.problem.model_function import ModelFunction

RADIUS = 1e-7


class Wrapped(nn.Module):
    def __init__(self, model, make):
        super().__init__()
        self.model, self.make = model, make

    def forward(self, *args, **kwargs):
        return self.make(self.model(*args, **kwargs))


@pytest.mark.parametrize(
    "make",
    [
        lambda logits: SimpleNamespace(loss=None, logits=logits),
        lambda logits: {"hidden": 0, "logits": logits},
        lambda logits: UserDict(logits=logits),
        lambda logits: (logits,),
        lambda logits: [logits.square().mean(), logits, (logits + 1, logits + 2)],  # loss, logits, hidden states
        lambda logits: (None, logits.argmax(1), logits),
    ],
)
@pytest.mark.parametrize("how", WAYS)
def test_logits_in_an_object(make, how, generator):
    model, make_inputs = mlp(generator)
    x, v = make_inputs(3), direction_of(model, generator)
    expected = fastmeta.label_gradient(model, x, v, how=how)
    renamed = {f"model.{name}": value for name, value in v.items()}
    torch.testing.assert_close(fastmeta.label_gradient(Wrapped(model, make), x, renamed, how=how), expected)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda logits: (logits, logits), TypeError, r"logits alone, got tuple of \[3, 3\] and \[3, 3\]"),
        (lambda logits: (logits.argmax(1),), TypeError, "must give logits, got tuple; return the logits alone"),
        (lambda logits: None, TypeError, "must give logits, got NoneType"),
        (lambda logits: {"scores": logits}, TypeError, "must give logits, got dict; .* names them logits"),
        (lambda logits: logits.argmax(1), TypeError, "must give logits"),
        (lambda logits: logits[:, 0], ValueError, r"\[N, C\], got \[3\]; .* as logits.unsqueeze\(-1\)"),
        (lambda logits: logits.mean(), ValueError, r"\[N, C\], got \[\]"),
    ],
)
def test_no_logits(make, error, match, generator):
    model, make_inputs = mlp(generator)
    model = Wrapped(model, make)
    with pytest.raises(error, match=match):
        fastmeta.label_gradient(model, make_inputs(3), direction_of(model, generator))


@pytest.mark.parametrize("how", WAYS)
def test_subset_unused_and_frozen_parameters(how, generator):
    """A name left out does not move; a parameter that the model does not use moves nothing."""
    model, make_inputs = mlp(generator)
    model.register_parameter("unused", nn.Parameter(normal(generator, 3)))
    x, y, v = make_inputs(4), torch.tensor([0, 1, 2, 0]), direction_of(model, generator)
    expected = fastmeta.label_gradient(model, x, v, how=how, radius=RADIUS)
    parts = [{name: v[name]} for name in v]
    summed = sum(fastmeta.label_gradient(model, x, part, how=how, radius=RADIUS) for part in parts)
    torch.testing.assert_close(summed, expected, rtol=1e-5, atol=1e-5)
    alone = {"unused": v["unused"]}
    assert not fastmeta.label_gradient(model, x, alone, how=how).any()
    assert not fastmeta.example_weight_gradient(model, x, y, alone, how=how).any()
    model[0].requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"direction must name parameters that require grad, got '0.weight', .* frozen"
    ):
        fastmeta.label_gradient(model, x, v, how=how)


@pytest.mark.parametrize("how", [*WAYS, "last_layer"])
def test_zero_direction(how, generator):
    model, make_inputs = mlp(generator)
    zero = {"fc.weight": torch.zeros_like(model.fc.weight)}
    got = fastmeta.label_gradient(model, make_inputs(4), zero, how=how)
    assert torch.equal(got, torch.zeros(4, 3, dtype=torch.float64))


@pytest.mark.parametrize("how", [*WAYS, "last_layer"])
def test_no_examples(how, generator):
    model, make_inputs = mlp(generator)
    v = {"fc.weight": normal(generator, *model.fc.weight.shape)}
    assert fastmeta.label_gradient(model, make_inputs(0), v, how=how).shape == (0, 3)
    targets = torch.zeros(0, dtype=torch.int64)
    assert fastmeta.example_weight_gradient(model, make_inputs(0), targets, v, how=how).shape == (0,)


@pytest.mark.parametrize("how", WAYS)
def test_tied_weight_by_either_name(how, generator):
    model, make_inputs = tied_net(generator)
    x, v = make_inputs(4), direction_of(model, generator)
    assert "decoder.weight" not in v
    expected = fastmeta.label_gradient(model, x, v, how=how)
    other = {("decoder.weight" if name == "encoder.weight" else name): value for name, value in v.items()}
    torch.testing.assert_close(fastmeta.label_gradient(model, x, other, how=how), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"once, got 'decoder.weight', which is also 'encoder.weight'"):
        fastmeta.label_gradient(model, x, v | {"decoder.weight": v["encoder.weight"]}, how=how)


def test_last_layer_tied_to_another(generator):
    model, make_inputs = mlp(generator, width=6, classes=6)
    model[0].weight = model.fc.weight
    v = {"0.weight": normal(generator, 6, 6)}
    fastmeta.label_gradient(model, make_inputs(3), v)
    with pytest.raises(ValueError, match="tied to another layer"):
        fastmeta.label_gradient(model, make_inputs(3), v, how="last_layer")
    x, targets = make_inputs(3), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="tied to another layer"):
        fastmeta.MetaGradient(how="last_layer").refine(model=model, unlabeled=x, holdout=x, targets=targets)


BAD_DIRECTIONS = [
    (lambda v: list(v.values()), TypeError, "direction must be a dict .* got list"),
    (lambda v: {}, TypeError, "direction must be a dict .* got an empty one"),
    (lambda v: v | {"fc.wieght": v["fc.weight"]}, ValueError, "parameters of Mlp, got 'fc.wieght'"),
    (
        lambda v: v | {"fc.weight": v["fc.weight"].T},
        ValueError,
        r"direction\['fc.weight'\] must be the parameter's shape",
    ),
    (lambda v: v | {"fc.bias": v["fc.bias"].float()}, TypeError, r"direction\['fc.bias'\] must be float64 .* float32"),
    (lambda v: v | {"fc.bias": v["fc.bias"].to("meta")}, ValueError, r"direction\['fc.bias'\] must be on cpu .* meta"),
    (lambda v: v | {"fc.bias": 1.0}, TypeError, r"direction\['fc.bias'\] must be a tensor, got float"),
]


@pytest.mark.parametrize(("change", "error", "match"), BAD_DIRECTIONS)
@pytest.mark.parametrize("how", ["jvp", "finite_difference", "last_layer"])
def test_bad_direction(change, error, match, how, generator):
    model, make_inputs = mlp(generator)
    v = {name: value for name, value in direction_of(model, generator).items() if name.startswith("fc")}
    before = everything_about(model)
    with pytest.raises(error, match=match):
        fastmeta.label_gradient(model, make_inputs(3), change(v), how=how)
    assert_same_state(before, everything_about(model))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"how": "forward"}, ValueError, "how must be one of"),
        ({"loss": "hinge"}, ValueError, "loss must be one of"),
        ({"radius": 0.0}, ValueError, "radius must be > 0"),
        ({"radius": "0.1"}, TypeError, "radius must be a number"),
    ],
)
def test_bad_options(options, error, match, generator):
    model, make_inputs = mlp(generator)
    v, targets = direction_of(model, generator), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(error, match=match):
        fastmeta.label_gradient(model, make_inputs(3), v, **options)
    with pytest.raises(error, match=match):
        fastmeta.example_weight_gradient(model, make_inputs(3), targets, v, **options)


@pytest.mark.parametrize("how", [*WAYS, "last_layer"])
@pytest.mark.parametrize(
    ("targets", "error"),
    [
        (torch.tensor([0, 1, 3]), ValueError),
        (torch.tensor([0, 1]), ValueError),
        (torch.ones(3, 2), ValueError),
        (torch.ones(3, 1), ValueError),
        (torch.tensor([0, 1, 2], dtype=torch.int32), TypeError),
        ([0, 1, 2], TypeError),
    ],
)
def test_bad_targets(how, targets, error, generator):
    model, make_inputs = mlp(generator)
    v = {"fc.weight": normal(generator, *model.fc.weight.shape)}
    with pytest.raises(error, match=r"^targets .*must be"):
        fastmeta.example_weight_gradient(model, make_inputs(3), targets, v, how=how)


@pytest.mark.parametrize(
    ("model", "error", "match"),
    [
        (torch.sin, TypeError, "model must be a torch.nn.Module"),
        (nn.Sequential(nn.LazyLinear(3)), ValueError, "0.weight is lazy; run the model once"),
        (nn.Embedding(4, 3, max_norm=1.0), ValueError, "must not change its parameters .* max_norm"),
        (nn.ReLU(), ValueError, "must have parameters that require grad"),
        (nn.Linear(4, 3).requires_grad_(False), ValueError, "must have parameters that require grad"),
    ],
)
def test_bad_model(model, error, match):
    with pytest.raises(error, match=match):
        fastmeta.label_gradient(model, torch.ones(3, 4), {"weight": torch.ones(3, 4)})


def test_scripted_model():
    with pytest.warns(DeprecationWarning, match="script"):
        model = torch.jit.script(nn.Linear(4, 3))
    with pytest.raises(TypeError, match="model must be a module in Python"):
        ModelFunction(model)


def test_sharded_parameters_are_refused(generator):
    """The last layer of such a model goes by its features."""
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), torch.randn(5, 4, generator=generator)
        targets = torch.tensor([0, 1, 1, 0, 1])
        expected = fastmeta.MetaGradient(how="last_layer").refine(model=model, unlabeled=x, holdout=x, targets=targets)
        fully_shard(model)
        for how in WAYS:
            with pytest.raises(ValueError, match="must have whole parameters, but those of this one are sharded"):
                fastmeta.MetaGradient(how=how).refine(model=model, unlabeled=x, holdout=x, targets=targets)
        with fastmeta.capture_features(model[2]) as tape:
            outputs = tape.outputs(model(x))
        got = fastmeta.MetaGradient().refine(unlabeled=outputs, holdout=outputs, targets=targets)
        torch.testing.assert_close(got.labels, expected.labels)
    finally:
        torch.distributed.destroy_process_group()
