"""fastmeta.verify: it says what is wrong, never that something wrong is exact, and changes nothing."""

import copy
import random

import numpy
import pytest
import torch
import trap_models as traps
from torch import nn

import fastmeta
from fastmeta.problem import HOWS
from fastmeta.problem.of_model import label_gradient
from fastmeta.verification import passes

ROWS = (*HOWS, "capture_features", "jvp and logits on a graph", "hold-out gradient", "Hessian product")


def made(make, seed=0):
    torch.manual_seed(seed)
    return make(), torch.randn(5, 6)


def verified(make):
    model, x = made(make)
    return fastmeta.verify(model, x, quiet=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False])
def test_a_good_model_is_exact_in_every_way(dtype, training, capsys):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))
    model.to(dtype).train(training)
    report = fastmeta.verify(model, torch.randn(5, 6, dtype=dtype), torch.tensor([0, 1, 2, 0, 1]))
    assert report.ok, report
    assert (report.best, report.problems, report.notes) == ("jvp", (), ())
    assert tuple(row.name for row in report.rows) == ROWS
    for row in report.rows:
        assert row.verdict == ("approximate" if "difference" in row.name else "exact"), row
        assert row.touched == ()
        assert row.error < (5e-2 if "difference" in row.name else 1e-7)
    printed = capsys.readouterr().out
    assert printed == f"{report}\n"
    assert all(line.startswith((*ROWS, "Sequential", "use how", " ")) for line in printed.splitlines() if line)


def test_a_good_model_in_half_precision_is_verified_in_a_copy():
    model, x = made(lambda: traps.Plain().bfloat16())
    report = fastmeta.verify(model, x.bfloat16(), quiet=True)
    assert report.ok, report
    assert report["jvp"].error < 1e-7
    assert "on a copy in float64" in report.model


# Models that defeat the package by design, and what the report has to say.
SEEN = {
    "generator": (traps.GlobalGenerator, "global GENERATOR"),
    "closure": (traps.by_calls_in_a_closure, "closure calls"),
    "clock": (traps.Clock, "two passes from the same state"),
    "global weights": (traps.GlobalWeights, "global WEIGHTS[0]"),
    "weights in a list": (traps.WeightsInAList, "attribute weights[0]"),
    "checkpointed weights": (traps.CheckpointedWeightsInAList, "attribute weights[0]"),
    "no_grad": (traps.WithoutGrad, "does not reach hidden.weight, hidden.bias"),
    "data": (traps.HeadByData, "does not reach head.weight"),
    "straight-through": (traps.Rounded, "straight-through"),
    "checkpoint of an input": (traps.ReentrantCheckpointOfInput, "does not reach hidden.weight, hidden.bias"),
    "wrong backward": (lambda: traps.OfFunction(traps.SineWrongBackward), "SineWrongBackward"),
    "wrong jvp": (lambda: traps.OfFunction(traps.SineWrongForwardMode), "SineWrongForwardMode"),
    "wrong second derivative": (lambda: traps.OfFunction(traps.SineOfConstant), "SineOfConstant"),
}


@pytest.mark.parametrize("name", SEEN)
def test_what_is_wrong_is_named(name):
    make, words = SEEN[name]
    report = verified(make)
    assert not report.ok
    assert any(words in problem for problem in report.problems), report


# With the model that has the same derivatives and no trap.
PAIRS = {
    "input in place": (traps.ChangesInput, lambda: Shifted(0.5)),
    "checkpoint": (traps.Checkpoint, traps.Plain),
    "reentrant checkpoint": (traps.ReentrantCheckpoint, traps.Plain),
    "reentrant checkpoint of a layer": (traps.ReentrantCheckpointOfLayer, traps.Plain),
    "checkpoint by hand": (traps.CheckpointByHand, traps.Plain),
    "scripted": (traps.Scripted, lambda: Swish()),
    "once differentiable": (lambda: traps.OfFunction(traps.SineOnce), lambda: Sine()),
    "counter": (traps.CountsCalls, traps.Plain),
    "weights in a list": (traps.WeightsInAList, traps.Plain),
}


class Shifted(traps.Plain):
    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, x):
        return super().forward(x - self.by)


class Swish(traps.Plain):
    def features(self, x):
        return nn.functional.silu(self.hidden(x))


class Sine(traps.Plain):
    def features(self, x):
        return self.hidden(x).sin()


@pytest.mark.parametrize("name", PAIRS)
def test_exact_is_said_of_right_values_alone(name):
    """Whatever a ``how`` makes of such a model, the report knows it."""
    make, make_plain = PAIRS[name]
    model, x = made(make)
    plain = make_plain()
    plain.load_state_dict(model.state_dict())
    report = fastmeta.verify(model, x, quiet=True)
    direction = {name: torch.randn_like(value) for name, value in plain.named_parameters()}
    expected = label_gradient(plain, x.clone(), direction, loss="mse")
    verdicts = {}
    for how in ("jvp", "double_backward", "finite_difference"):
        try:
            value = label_gradient(model, x.clone(), direction, loss="mse", how=how, radius=1e-2)
        except (NotImplementedError, RuntimeError, ValueError, TypeError):
            verdicts[how] = "refused"
            continue
        right = (value - expected).norm() < 2e-2 * expected.norm()
        verdicts[how] = ("approximate" if "difference" in how else "exact") if right else "disagrees"
    assert {how: report[how].verdict for how in verdicts} == verdicts, report


@pytest.mark.parametrize("make", [traps.CosineHead, traps.FrozenHead, traps.SpectralNorm])
def test_a_head_that_is_no_linear_layer_is_never_exact_in_silence(make):
    report = verified(make)
    assert report["capture_features"].verdict in ("disagrees", "refused") or make is traps.SpectralNorm
    if report["capture_features"].verdict == "disagrees":
        assert any("capture_features" in problem for problem in report.problems)


def test_a_scripted_part_is_verified_without_a_copy():
    def scripted_part():
        model = traps.Plain()
        model.hidden = torch.jit.script(model.hidden)
        return model

    report = verified(scripted_part)
    assert report.ok, report
    assert "copy" not in report.model  # a copy of TorchScript forgets which parameters train
    assert report["finite_difference"].verdict == "approximate"


def test_a_head_with_a_constant_is_exact():
    model, x = made(traps.Plain)
    model.head.bias.requires_grad_(False)
    report = fastmeta.verify(model, x, quiet=True)
    assert report["capture_features"].verdict == "exact", report


def test_inputs_that_the_model_puts_on_its_graph_are_taken_off_it():
    class ScalesInput(traps.Plain):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(6))

        def forward(self, x):
            return super().forward(x.mul_(self.scale))

    model, x = made(ScalesInput)
    report = fastmeta.verify(model, x, quiet=True)
    assert report.ok, report
    assert report.notes == ("one forward of the model changes inputs",)
    assert x.is_leaf


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("make", [traps.Plain, lambda: traps.Plain().double()])
def test_a_value_that_is_10_percent_off_is_seen(how, make, monkeypatch):
    def off(*args, **options):
        return 1.1 * label_gradient(*args, **options) if options["how"] == how else label_gradient(*args, **options)

    model, x = made(make)
    monkeypatch.setattr(passes, "label_gradient", off)
    report = fastmeta.verify(model, x.to(model.head.weight), quiet=True)
    assert [row.name for row in report.rows if row.verdict == "disagrees"] == [how]
    assert not report.ok


def test_what_a_pass_leaves_changed_is_seen_and_put_back(monkeypatch):
    model, x = made(lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)))
    before = copy.deepcopy(model.state_dict())
    memory = x.clone()

    def careless(model, inputs, *args, **options):
        value = label_gradient(model, inputs, *args, **options)
        if options["how"] == "jvp":
            model[1].running_mean.add_(1)
            model[0].bias.grad = torch.ones(8)
            model[0].note = "seen"
            model.eval()
            inputs.add_(1)
            torch.rand(1)
            random.random()
            numpy.random.rand()
        return value

    monkeypatch.setattr(passes, "label_gradient", careless)
    report = fastmeta.verify(model, x, quiet=True)
    assert set(report["jvp"].touched) == {
        "buffer 1.running_mean",
        "parameter 0.bias",
        "attribute 0.note",
        "mode of the model",
        "mode of 0",
        "mode of 1",
        "mode of 2",
        "inputs",
        "random state of torch",
        "random state of Python",
        "random state of NumPy",
    }
    assert report["jvp"].verdict == "exact"
    assert not report.ok
    assert not hasattr(model[0], "note")
    assert model.training
    assert model[0].bias.grad is None
    assert x.equal(memory)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("make", [traps.Plain, traps.LazyBuffer, traps.ByCalls, traps.OwnGenerator, traps.PythonNoise])
def test_nothing_of_the_model_is_changed(make):
    model, x = made(make)
    model.hidden.weight.grad = gradient = torch.randn(8, 6)
    kept = gradient.clone()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = {name: value for name, value in vars(model).items() if isinstance(value, int)}
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    noise = getattr(model, "noise", torch.Generator()).get_state()
    randomness = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    fastmeta.verify(model, x, quiet=True)
    assert model.hidden.weight.grad is gradient
    assert gradient.equal(kept)
    assert model.state_dict().keys() == state.keys()
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())
    assert attributes == {name: value for name, value in vars(model).items() if isinstance(value, int)}
    assert addresses == [parameter.data_ptr() for parameter in model.parameters()]
    assert noise.equal(getattr(model, "noise", torch.Generator()).get_state())
    assert randomness[0].equal(torch.get_rng_state())
    assert randomness[1] == random.getstate()
    assert (randomness[2] == numpy.random.get_state()[1]).all()


def test_a_model_that_raises_is_put_back():
    class Raises(traps.ByCalls):
        def forward(self, x):
            super().forward(x)
            self.hidden.weight.data.add_(1)
            raise RuntimeError("out of memory")

    model, x = made(Raises)
    before = model.hidden.weight.clone()
    with pytest.raises(RuntimeError, match="out of memory"):
        fastmeta.verify(model, x, quiet=True)
    assert model.hidden.weight.equal(before)
    assert model.calls == 0


def test_a_counter_without_effect_is_a_note_and_not_a_problem():
    report = verified(traps.CountsCalls)
    assert report.ok, report
    assert "one forward of the model changes attribute calls" in report.notes


def test_arguments_are_checked_first():
    model, x = made(traps.Plain)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        fastmeta.verify("model", x)
    with pytest.raises(ValueError, match="model must have parameters that require grad, got none"):
        fastmeta.verify(model.requires_grad_(False), x)
    with pytest.raises(ValueError, match=r"targets must be classes in \[0, 3\), got 3"):
        fastmeta.verify(model.requires_grad_(), x, torch.tensor([0, 1, 2, 3, 0]))


@pytest.mark.parametrize("outputs", [1, 3])
def test_inputs_by_name_and_a_single_output(outputs):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, outputs)

        def forward(self, *, images, scale):
            return {"logits": self.head(images * scale)}

    model, x = made(Named)
    report = fastmeta.verify(model, {"images": x, "scale": 0.5}, quiet=True)
    assert report.ok, report


class DropsTangent(fastmeta.derivatives.LabelGradient):
    """A derivative that is right by double backward alone."""

    def at(self, problem, direction):
        return super().at(problem, direction) * (1 if self.how == "double_backward" else 1.1)


def test_a_step_of_each_method_is_compared_with_its_definition():
    model, x = made(traps.Plain)
    names = ["L2I", "MetaGradient", "ExampleWeights", "LabelGradientAlignment", "AlignedImputation"]
    good = [*names, fastmeta.L2I(how="jvp"), fastmeta.ExampleWeights(5, how="jvp")]
    report = fastmeta.verify(model, x, torch.tensor([0, 1, 2, 0, 1]), methods=good, quiet=True)
    assert report.ok, report
    assert [row.name for row in report.rows[-7:]] == [*names, "L2I", "ExampleWeights"]
    assert all(row.verdict == "exact" for row in report.rows[-7:]), report
    probe = fastmeta.MetaGradient(how="finite_difference")
    wrong = fastmeta.MetaGradient(how="jvp")
    wrong.derivative = DropsTangent(how="jvp")
    report = fastmeta.verify(model, x, methods=[probe, wrong], quiet=True)
    assert [row.verdict for row in report.rows[-2:]] == ["unknown", "disagrees"]
    assert not report.ok


def test_methods_must_be_methods_or_their_names():
    model, x = made(traps.Plain)
    with pytest.raises(ValueError, match=r"methods must be methods or names of their classes \(.*L2I.*\), got 'L3I'"):
        fastmeta.verify(model, x, methods=["L3I"])
    with pytest.raises(TypeError, match="methods must be methods or names of their classes, got int"):
        fastmeta.verify(model, x, methods=[3])


def test_the_padding_of_an_embedding_never_moves():
    class OfTokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(9, 8, padding_idx=0)
            nn.init.normal_(self.embedding.weight)
            self.head = nn.Linear(8, 3)

        def forward(self, tokens):
            return self.head(torch.tanh(self.embedding(tokens)).mean(1))

    model, _ = made(OfTokens)
    report = fastmeta.verify(model, torch.tensor([[0, 1, 2], [3, 0, 0]]), quiet=True)
    assert report.ok, report
    assert report["jvp"].verdict == "exact"
