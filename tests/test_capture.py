"""capture_features: the right rows of features, from any model, with nothing left behind."""

import copy
import gc
import pickle
import shutil
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastmeta import Outputs, capture_features


class Nested(nn.Module):
    """The layer of interest sits two modules deep; another linear layer comes before it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
        self.classifier = nn.ModuleDict({"head": nn.Sequential(nn.Dropout(0.0), nn.Linear(6, 3))})

    @property
    def fc(self) -> nn.Linear:
        return self.classifier["head"][1]

    def forward(self, inputs: Tensor) -> Tensor:
        return self.classifier["head"](self.body(inputs))


@pytest.fixture
def model(generator) -> Nested:
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
    return Nested()


def assert_reproduces(outputs: Outputs, logits: Tensor, features: Tensor, fc: nn.Linear) -> None:
    """Features of exactly these rows, and the layer that makes the logits of them."""
    assert outputs.logits is logits
    assert not outputs.features.requires_grad
    torch.testing.assert_close(outputs.features, features, rtol=1e-5, atol=1e-6)
    assert torch.equal(outputs.weight, fc.weight)
    assert torch.equal(outputs.bias, fc.bias)
    assert not outputs.weight.requires_grad


@pytest.mark.parametrize("whole_model", [True, False], ids=["model", "layer"])
def test_several_calls_are_kept_in_order(model, whole_model):
    inputs = [torch.randn(n, 4) for n in (5, 2, 7)]
    with capture_features(model if whole_model else model.fc) as tape:
        logits = [model(x) for x in inputs]
    assert [len(features) for features, _ in tape.calls] == [5, 2, 7]
    for x, f in zip(reversed(inputs), reversed(logits), strict=True):
        assert_reproduces(tape.outputs(f), f, model.body(x), model.fc)


CUTS = {
    "slice": lambda f: f[2:5],
    "strided": lambda f: f[1::3],
    "split": lambda f: f.split([4, 2, 4])[1],
    "chunk": lambda f: f.chunk(3)[2],
    "chunk of a slice": lambda f: f[1:].chunk(2)[1],
    "one row": lambda f: f[3:4],
    "no row": lambda f: f[4:4],
    "all": lambda f: f[:],
    "detached": lambda f: f[3:].detach(),
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_rows_of_one_concatenated_forward(model, cut):
    inputs = torch.randn(10, 4)
    with capture_features(model) as tape:
        logits = cut(model(inputs))
    assert_reproduces(tape.outputs(logits), logits, cut(model.body(inputs)), model.fc)


def test_rows_of_one_call_are_not_taken_for_those_of_another(model):
    first, second = torch.randn(10, 4), torch.randn(10, 4)
    with capture_features(model) as tape:
        logits = model(first), model(second)
    part = logits[0][6:]
    assert_reproduces(tape.outputs(part), part, model.body(first)[6:], model.fc)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("cut", [CUTS["split"], CUTS["all"], lambda f: f], ids=["split", "view", "whole"])
def test_cast_logits_are_recognized(model, grad, cut):
    inputs = torch.randn(10, 4)
    with capture_features(model) as tape, torch.set_grad_enabled(grad):
        with torch.autocast("cpu", torch.bfloat16):
            half = model(inputs)
        assert half.dtype == torch.bfloat16
        logits = cut(half.float())
    outputs = tape.outputs(logits)
    assert outputs.logits is logits
    assert outputs.features.dtype == torch.bfloat16 or outputs.features.dtype == torch.float32
    torch.testing.assert_close(outputs.features.float(), cut(model.body(inputs)), rtol=2e-2, atol=2e-2)


def test_cast_of_another_call_is_not_recognized(model):
    inputs = torch.randn(10, 4)
    unseen = model(inputs).double()
    with capture_features(model) as tape:
        model(inputs + 1)
    with pytest.raises(RuntimeError, match=r"are not rows of any output of the layer 'classifier\.head\.1'"):
        tape.outputs(unseen)


NOT_ROWS = {
    "computed": lambda f: f * 2,
    "transposed": lambda f: f[:3].T,
    "columns": lambda f: f[:, 1:],
    "shifted": lambda f: f.view(-1)[1:10].view(3, 3),
}


@pytest.mark.parametrize("change", NOT_ROWS.values(), ids=NOT_ROWS)
def test_other_tensors_are_refused(model, change):
    with capture_features(model) as tape:
        logits = model(torch.randn(10, 4))
    with pytest.raises(RuntimeError, match="are not rows of any output"):
        tape.outputs(change(logits))


def test_logits_changed_in_place_are_refused(model):
    with capture_features(model) as tape, torch.no_grad():
        logits = model(torch.randn(10, 4))
        logits.div_(0.5)
    with pytest.raises(ValueError, match="changed in place"):
        tape.outputs(logits[:3])


def test_features_changed_in_place_are_an_error() -> None:
    """As of a backbone without a graph that writes into one buffer, where no backward pass would say so."""
    layer, buffer = nn.Linear(4, 3), torch.zeros(6, 4)
    with capture_features(layer) as tape:
        buffer.normal_()
        first = layer(buffer)
        buffer.normal_()
        second = layer(buffer)
    tape.outputs(second)
    with pytest.raises(
        ValueError, match=r"the features that went into the layer .* were changed in place after the call"
    ):
        tape.outputs(first)


def test_more_dimensions(model):
    inputs = torch.randn(2, 5, 4)
    with capture_features(model) as tape:
        logits = model(inputs)
    with pytest.raises(ValueError, match=r"must be 2-D \[N, C\], got 3-D .*flatten"):
        tape.outputs(logits)
    flat = logits.flatten(0, -2)
    assert_reproduces(tape.outputs(flat), flat, model.body(inputs).flatten(0, 1), model.fc)


def test_a_layer_that_did_not_run_is_named(model):
    with pytest.raises(RuntimeError, match=r"'classifier.head.1' Linear\(6, 3\).*did not run"), capture_features(model):
        model.body(torch.randn(2, 4))
    with pytest.raises(RuntimeError, match=r"Linear\(6, 3\) did not run"), capture_features(model.fc):
        pass
    with capture_features(model.fc) as tape:
        with pytest.raises(RuntimeError, match="has not run"):
            tape.outputs(torch.zeros(2, 3))
        model(torch.randn(2, 4))


def test_unsuitable_modules_are_refused():
    with (
        pytest.raises(ValueError, match=r"must be or contain an nn.Linear, got Conv2d"),
        capture_features(nn.Conv2d(1, 1, 1)),
    ):
        pass
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got int"), capture_features(3):
        pass
    with pytest.raises(ValueError, match="is lazy"), capture_features(nn.LazyLinear(3)):
        pass


def test_the_wrong_one_of_two_heads_is_refused():
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classes = nn.Linear(4, 3)
            self.rotations = nn.Linear(4, 3)

        def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
            return self.classes(inputs), self.rotations(inputs)

    model, inputs = TwoHeads(), torch.randn(5, 4)
    with capture_features(model) as tape:
        classes, rotations = model(inputs)
    assert tape.outputs(rotations).features.shape == (5, 4)
    with pytest.raises(RuntimeError, match=r"'rotations' .*last of 2 nn.Linear in TwoHeads.*capture that one"):
        tape.outputs(classes)


def test_the_model_is_left_as_it_was(model):
    before = dict(model.fc.__dict__)
    with capture_features(model):
        model(torch.randn(2, 4))
    with pytest.raises(ZeroDivisionError), capture_features(model):
        raise ZeroDivisionError
    assert type(model.fc) is nn.Linear
    assert model.fc.__dict__ == before


@pytest.mark.parametrize("run_first", [False, True])
def test_a_copy_made_in_the_block_is_a_plain_model(model, run_first):
    with capture_features(model):
        if run_first:
            model(torch.randn(2, 4))
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        model(torch.randn(2, 4))
    for copied in copies:
        assert type(copied.fc) is nn.Linear
        assert copied.fc.__dict__.keys() == model.fc.__dict__.keys()
        assert torch.equal(copied.fc.weight, model.fc.weight)


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module, run: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.run = run

    def forward(self, inputs: Tensor) -> Tensor:
        return self.run(self.model, inputs)


def checkpointed(model: nn.Module, inputs: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(model, inputs, use_reentrant=False)


def functional(model: nn.Module, inputs: Tensor) -> Tensor:
    return torch.func.functional_call(model, dict(model.named_parameters()), (inputs,))


@pytest.mark.parametrize("run", [checkpointed, functional])
def test_other_ways_to_run_a_model(model, run):
    inputs = torch.randn(5, 4)
    with capture_features(Wrapper(model, run)) as tape:
        logits = Wrapper(model, run)(inputs)
    logits.sum().backward()
    assert_reproduces(tape.outputs(logits), logits, model.body(inputs), model.fc)


def test_reparametrized_layer(model):
    nn.utils.parametrizations.weight_norm(model.fc)
    inputs = torch.randn(5, 4)
    with capture_features(model) as tape:
        logits = model(inputs)
    assert_reproduces(tape.outputs(logits), logits, model.body(inputs), model.fc)


def test_hooks_of_others_still_run(model):
    """A pre-hook changes the features that the layer sees; a hook that changes the output makes other logits of it."""
    inputs = torch.randn(5, 4)
    handle = model.fc.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    with capture_features(model) as tape:
        logits = model(inputs)
    assert_reproduces(tape.outputs(logits), logits, 2 * model.body(inputs), model.fc)
    handle.remove()
    model.fc.register_forward_hook(lambda module, args, output: 2 * output)
    with capture_features(model) as tape:
        logits = model(inputs)
    with pytest.raises(RuntimeError, match="are not rows"):
        tape.outputs(logits)


def test_inference_mode(model):
    inputs = torch.randn(5, 4)
    with torch.inference_mode(), capture_features(model) as tape:
        logits = model(inputs)
    assert_reproduces(tape.outputs(logits), logits, model.body(inputs), model.fc)


def test_only_the_tape_keeps_tensors(model):
    with capture_features(model) as tape:
        logits = model(torch.randn(8, 4))
    outputs = tape.outputs(logits[:2])
    alive = weakref.ref(tape.calls[0][1])
    kept = outputs.features
    del tape, logits, outputs
    gc.collect()
    assert alive() is None
    assert len(kept) == 2


def test_blocks_nest(model):
    with capture_features(model) as outer:
        first = model(torch.randn(2, 4))
        with capture_features(model.fc) as inner:
            second = model(torch.randn(3, 4))
        third = model(torch.randn(4, 4))
    assert [len(features) for features, _ in outer.calls] == [2, 3, 4]
    assert [len(features) for features, _ in inner.calls] == [3]
    assert type(model.fc) is nn.Linear
    with pytest.raises(RuntimeError, match="are not rows"):
        inner.outputs(first)
    for f in (first, second, third):
        assert outer.outputs(f).logits is f


def test_gradients_are_those_of_the_plain_model(model):
    inputs = torch.randn(5, 4)
    expected = torch.autograd.grad(model(inputs).square().sum(), list(model.parameters()))
    with capture_features(model) as tape:
        logits = model(inputs)
    got = torch.autograd.grad(tape.outputs(logits).logits.square().sum(), list(model.parameters()))
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(g, e)


COMPILER = pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=COMPILER)])
def test_compiled_before_the_block(model, backend):
    """Compiled and run without capture first: the old graph must not serve the block, nor the new one what follows."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    compiled(torch.randn(6, 4))
    for capture in (compiled, model.fc, compiled.fc):
        inputs = [torch.randn(6, 4), torch.randn(6, 4)]
        with capture_features(capture) as tape:
            logits = [compiled(x) for x in inputs]
        for x, f in zip(inputs, logits, strict=True):
            assert_reproduces(tape.outputs(f), f, model.body(x), model.fc)
            part = f[2:5]
            assert_reproduces(tape.outputs(part), part, model.body(x)[2:5], model.fc)
        got = torch.autograd.grad(sum(f.square().sum() for f in logits), list(model.parameters()))
        expected = torch.autograd.grad(sum(model(x).square().sum() for x in inputs), list(model.parameters()))
        torch.testing.assert_close(got, expected)
        compiled(inputs[0])
    # One graph without the recording and one with it, whatever the number of blocks and calls.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_compiled_under_autocast(model):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    inputs = torch.randn(6, 4)
    with torch.autocast("cpu", torch.bfloat16), capture_features(compiled) as tape:
        logits = compiled(inputs).float()
    for rows in (slice(None), slice(2, 5)):
        part = logits[rows]
        outputs = tape.outputs(part)
        torch.testing.assert_close(outputs.features.float(), model.body(inputs)[rows], rtol=2e-2, atol=2e-2)


def test_a_whole_compiled_step(model):
    """The block itself inside a compiled function."""
    torch._dynamo.reset()

    def step(inputs: Tensor) -> tuple[Tensor, Tensor]:
        with capture_features(model) as tape:
            logits = model(inputs)
        outputs = tape.outputs(logits)
        return outputs.features, outputs.logits

    inputs = torch.randn(6, 4)
    torch.testing.assert_close(torch.compile(step, backend="aot_eager")(inputs), step(inputs))
    assert type(model.fc) is nn.Linear


@pytest.mark.parametrize("compiled", [None, "inside", "outside"])
def test_distributed_data_parallel(model, process_group, compiled):
    torch._dynamo.reset()
    inner = torch.compile(model, backend="aot_eager") if compiled == "inside" else model
    parallel = DistributedDataParallel(inner)
    run = torch.compile(parallel, backend="aot_eager") if compiled == "outside" else parallel
    inputs = torch.randn(6, 4)
    run(inputs)
    with capture_features(run) as tape:
        logits = run(inputs)
    labeled, unlabeled = logits.split([2, 4])
    assert_reproduces(tape.outputs(labeled), labeled, model.body(inputs)[:2], model.fc)
    assert_reproduces(tape.outputs(unlabeled), unlabeled, model.body(inputs)[2:], model.fc)
    unlabeled.sum().backward()
    assert model.fc.weight.grad is not None
