"""Whole-model derivatives under autocast, of data-parallel and compiled models, and inside compiled code."""

import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed
from conftest import SEED
from model_checks import EXACT, WAYS, assert_same_state, direction_of, double, everything_about
from torch import nn
from whole_model_nets import conv_net, text_net, tied_net

import fastmeta
from fastmeta.problem.model_function import ModelFunction

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("wrapper", [nn.DataParallel, nn.parallel.DistributedDataParallel])
def test_data_parallel(wrapper, generator, process_group):
    """By the names of the wrapper's parameters or of the module's; and a reducer goes on as ever."""
    model, make_inputs = conv_net(generator, dropout=0.0)
    x, v = make_inputs(4), direction_of(model, generator)
    wrapped = wrapper(model)
    for how in (*WAYS, "last_layer"):
        moving = {"fc.weight": v["fc.weight"]} if how == "last_layer" else v
        expected = fastmeta.label_gradient(model, x, moving, how=how)
        for names in (moving, {f"module.{name}": value for name, value in moving.items()}):
            before = everything_about(wrapped)
            torch.testing.assert_close(fastmeta.label_gradient(wrapped, x, names, how=how), expected)
            assert_same_state(before, everything_about(wrapped))
    wrapped(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("name", ["conv", "text", "tied"])
@pytest.mark.parametrize("how", EXACT)
@pytest.mark.parametrize("train", [True, False])
def test_autocast(name, how, train, generator):
    """To the accuracy of bfloat16."""
    model, make_inputs = {"conv": conv_net, "text": text_net, "tied": tied_net}[name](generator)
    model.float().train(train)
    x = make_inputs(16)
    if not isinstance(x, dict):
        x = tuple(t.float() for t in x) if isinstance(x, tuple) else x.float()
    v = direction_of(model, generator)
    torch.manual_seed(1)
    expected = fastmeta.label_gradient(model, x, v, how=how)
    torch.manual_seed(1)
    with autocast():
        got = fastmeta.label_gradient(model, x, v, how=how)
        # Inside it differs from outside, so it was on.
        assert ModelFunction(model).logits(x).dtype == torch.bfloat16
    assert got.dtype == torch.float32
    assert 0 < (got - expected).norm() <= 0.1 * expected.norm()


@pytest.mark.parametrize("how", WAYS[2:])
def test_autocast_differences(how, generator):
    """The casts of the weights are those of the perturbed ones, also if the caller's cache holds others."""
    model = double(nn.Linear(16, 4, bias=False), generator).float()
    x, v = torch.randn(64, 16, generator=generator), {"weight": torch.randn(4, 16, generator=generator)}
    expected = 2 * x @ v["weight"].T
    with autocast():
        logits = model(x)  # fills the cache
        got = fastmeta.label_gradient(model, x, v, loss="mse", how=how, radius=8.0)
        after = model(x)
    assert (got - expected).norm() <= 0.02 * expected.norm()
    assert torch.equal(after, logits)
    after.sum().backward()
    assert model.weight.grad is not None


@pytest.mark.parametrize("how", WAYS)
def test_autocast_keeps_nothing(how, generator):
    """Neither parameters nor casts of them live on in the caller's cache."""
    model = double(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 3)), generator).float()
    x, v, seen = torch.randn(4, 16, generator=generator), direction_of(model, generator), []
    model[0].register_forward_hook(lambda module, *_: seen.append(weakref.ref(module.weight)))
    with autocast():
        fastmeta.label_gradient(model, x, v, how=how)
        ModelFunction(model).gradient(x, torch.sum)
        gc.collect()
        assert seen
        assert all(weight() is None for weight in seen)


def test_autocast_last_layer(generator):
    model, make_inputs = conv_net(generator)
    model.float().eval()
    x, y = make_inputs(6).float(), torch.tensor([0, 1, 2, 0, 1, 2])
    v = direction_of(model, generator, names=("fc.weight", "fc.bias"))
    expected = [fastmeta.label_gradient(model, x, v), fastmeta.example_weight_gradient(model, x, y, v)]
    with autocast():
        got = [
            fastmeta.label_gradient(model, x, v, how="last_layer"),
            fastmeta.example_weight_gradient(model, x, y, v, how="last_layer"),
        ]
    for g, e in zip(got, expected, strict=True):
        assert (g - e).norm() <= 0.1 * e.norm()


def test_compiled():
    """In a process of its own: torch.compile keeps state between calls."""
    tests = str(ROOT / "tests")
    names = "around_refine around compiled_model compiled_part compiled_in_place"
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {tests!r}]; sys.argv[1:] = [{names!r}, '{SEED}']\n"
    code += f"import runpy; runpy.run_path({tests + '/compiled_models.py'!r}, run_name='__main__')"
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert got.stdout.strip().endswith("done"), got.stdout + got.stderr[-4000:]
