"""What a base keeps from step to step: continued bit for bit, and untouched by a step that is not finite."""

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from small_trainers import trainer
from torch import Tensor

from fastmeta.ssl import BASES
from fastmeta.training.batches import Batches
from fastmeta.training.config import MachineConfig
from fastmeta.training.processes import Processes

WITH_MEMORY = ["uda", "flexmatch", "freematch", "remixmatch"]


def tensors(state: Any, name: str = "") -> dict[str, Tensor]:
    if isinstance(state, Tensor):
        return {name: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return {key: tensor for place, value in items for key, tensor in tensors(value, f"{name}.{place}").items()}


@pytest.mark.parametrize("base", WITH_MEMORY)
def test_a_run_goes_on_bit_for_bit(base: str) -> None:
    whole, first, second = (trainer(base, "l2i", None, normalized=True) for _ in range(3))
    for _ in range(3):
        whole.train_step()
    first.train_step()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(2):
        second.train_step()
    found, wanted = tensors(second.state_dict()), tensors(whole.state_dict())
    assert found.keys() == wanted.keys()
    assert any(name.startswith(".memory") for name in found)
    for name, value in wanted.items():
        assert found[name].equal(value), name


@pytest.mark.parametrize("base", WITH_MEMORY)
def test_a_step_that_is_not_finite_is_not_remembered(base: str) -> None:
    run = trainer(base, "none", None)
    run.train_step()
    start = copy.deepcopy(run.memory.state_dict())
    views = run.batches.data.views
    weak = dataclasses.replace(views, weak=lambda images, random: views.weak(images, random) * torch.nan)
    run.batches.data = dataclasses.replace(run.batches.data, views=weak)
    run.train_step()
    assert run.skipped.tolist() == [1, 1]
    assert all(value.equal(start[name]) for name, value in run.memory.state_dict().items())
    run.batches.data = dataclasses.replace(run.batches.data, views=views)
    run.train_step()
    after = run.memory.state_dict()
    assert not all(value.equal(start[name]) for name, value in after.items())
    assert all(value.isfinite().all() for value in after.values())


@pytest.mark.parametrize("base", [name for name, base in BASES.items() if base.task == "classification"])
def test_images_that_nobody_knows_the_class_of(base: str) -> None:
    """Foreign ones among the unlabeled: they are in no error, and no base asks for their class."""
    known, foreign = (trainer(base, "none", None) for _ in range(2))
    foreign._truth[:] = -1
    for run in (known, foreign):
        run.train_step()
    assert all(value.equal(foreign.model.state_dict()[name]) for name, value in known.model.state_dict().items())
    averages = foreign.step_averages.read()
    assert not any(name.endswith("_error") for name in averages)
    assert math.isfinite(averages["loss"])


def test_the_layer_that_tells_turns_is_trained() -> None:
    run = trainer("remixmatch", "none", None)
    before = run.memory.head.weight.detach().clone()
    run.train_step()
    assert float((run.memory.head.weight.detach() - before).abs().max()) > 1e-5
    assert not any("head" in name for name in run.model.state_dict())


def test_more_views_are_other_views() -> None:
    run = trainer("mixmatch", "none", None)  # of three
    batch = run.batches(1)
    assert len(batch.more) == 1
    views = [batch.weak, batch.second, *batch.more]
    assert not any(one.equal(other) for k, one in enumerate(views) for other in views[:k])
    assert all(float((view - batch.weak).abs().max()) < 0.1 for view in views)  # weak ones
    data, machine = run.data, MachineConfig()
    strong = Batches(data, second_view="strong", more_views=2, seed=0, machine=machine, processes=Processes())
    assert all(float((view - batch.weak).abs().max()) > 0.1 for view in strong(1).more)
