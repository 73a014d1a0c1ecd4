"""A snapshot sees what a pass may change wherever the model keeps it, names it, and puts it back."""

import collections
import functools
import random

import numpy
import pytest
import torch
from torch import nn

from fastmeta.verification.snapshot import Snapshot

COUNTS = {"calls": 0}
calls = 0


class Counter:
    """Counts in itself and in its class."""

    total = 0

    def __init__(self):
        self.calls = 0

    def up(self):
        self.calls += 1

    def up_in_class(self):
        Counter.total += 1


def in_globals():
    global calls
    calls += 1
    COUNTS["calls"] += 1


def in_closure():
    seen = 0

    def up():
        nonlocal seen
        seen += 1

    return up


def in_default(box=[0]):  # noqa: B006
    box[0] += 1


def append(items):
    items.append(len(items))


# What the model holds, what is done to it, and what is then said to have changed.
KEPT = {
    "number": (3, lambda model: setattr(model, "kept", 4), ["attribute kept"]),
    "list": ([1], lambda model: append(model.kept), ["attribute kept"]),
    "deque": (collections.deque([1, 2], maxlen=2), lambda model: append(model.kept), ["attribute kept"]),
    "set": ({3, 1}, lambda model: model.kept.add(2), ["attribute kept"]),
    "dict": ({"a": 1}, lambda model: model.kept.update(a=2, b=1), ["attribute kept['a']", "attribute kept['b']"]),
    "tuple": (([1],), lambda model: append(model.kept[0]), ["attribute kept[0]"]),
    "tensor": ([torch.zeros(2)], lambda model: model.kept[0].add_(1), ["attribute kept[0]"]),
    "shape": (torch.zeros(2), lambda model: setattr(model.kept, "data", torch.ones(3)), ["attribute kept"]),
    "array": (numpy.zeros(2), lambda model: numpy.add(model.kept, 1, out=model.kept), ["attribute kept"]),
    "object": ({"a": Counter()}, lambda model: model.kept["a"].up(), ["attribute kept['a'].calls"]),
    "method": (Counter().up, lambda model: model.kept(), ["attribute kept.calls"]),
    "class": (Counter(), lambda model: model.kept.up_in_class(), ["class attribute Counter.total"]),
    "partial": (functools.partial(append, [1]), lambda model: model.kept(), ["attribute kept"]),
    "closure": (in_closure(), lambda model: model.kept(), ["closure seen of in_closure.<locals>.up"]),
    "default": (in_default, lambda model: model.kept(), ["closure default of in_default"]),
    "globals": (in_globals, lambda model: model.kept(), ["global calls", "global COUNTS['calls']"]),
    "generator": (torch.Generator(), lambda model: torch.rand(1, generator=model.kept), ["attribute kept"]),
    "generator of Python": (random.Random(0), lambda model: model.kept.random(), ["attribute kept"]),
    "generator of NumPy": (numpy.random.default_rng(0), lambda model: model.kept.random(), ["attribute kept"]),
    "old generator of NumPy": (numpy.random.RandomState(0), lambda model: model.kept.rand(), ["attribute kept"]),
    "mode": (None, lambda model: model.eval(), ["mode of the model"]),
    "weight": (None, lambda model: model.weight.data.fill_(float("nan")), ["parameter weight"]),
    "new buffer": (None, lambda model: model.register_buffer("mean", torch.zeros(1)), ["buffer mean"]),
    "flag": (None, lambda model: model.weight.requires_grad_(False), ["parameter weight"]),
    "gradient": (None, lambda model: setattr(model.weight, "grad", torch.ones(3, 2)), ["parameter weight"]),
    "layer": ([nn.BatchNorm1d(2)], lambda model: model.kept[0].running_mean.add_(1), ["buffer kept[0].running_mean"]),
    "random state": (None, lambda model: torch.rand(1), ["random state of torch"]),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_change_is_seen_and_put_back(name):
    kept, change, names = KEPT[name]
    model = nn.Linear(2, 3)
    model.kept = kept
    snapshot = Snapshot(model, None)
    for _ in range(2):
        assert snapshot.changed() == []
        change(model)
        assert sorted(snapshot.changed()) == sorted(names)
        snapshot.restore()
    assert snapshot.changed() == []


def test_equal_values_in_other_objects_are_no_change():
    model = nn.Linear(2, 3)
    model.kept = {"list": [torch.ones(2), (1, 2)], "nan": float("nan"), "array": numpy.ones(2)}
    snapshot = Snapshot(model, None)
    model.kept = {"list": [torch.ones(2), (1, 2)], "nan": float("nan"), "array": numpy.ones(2)}
    assert snapshot.changed() == []
    model.kept = {"list": [torch.ones(2), (1, 3)], "nan": float("nan"), "array": numpy.ones(2)}
    assert snapshot.changed() == ["attribute kept"]
    model.weight = nn.Parameter(model.weight.detach().clone())  # another one that an optimizer does not know
    assert "parameter weight" in snapshot.changed()


def test_a_whole_tree_of_inputs_is_seen():
    inputs = {"x": [torch.zeros(2)], "more": Counter()}
    snapshot = Snapshot(nn.Linear(2, 3), inputs)
    inputs["x"][0].add_(1)
    inputs["more"].up()
    assert snapshot.changed() == ["inputs['x'][0]", "inputs['more'].calls"]
    snapshot.restore()
    assert (inputs["x"][0].sum(), inputs["more"].calls) == (0, 0)
