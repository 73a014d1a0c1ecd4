"""Tables of several processes, whose samplers draw anew from the whole set, against one table of the joined batch."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import forked
import pytest
import torch
import torch.distributed
from cases import Draw
from torch import Tensor, nn

import fastmeta
from fastmeta import ExampleWeights, ImputeAndWeight, LabelGradientAlignment, Method
from fastmeta.ops.masked_adam_table import MaskedAdamTable
from fastmeta.ops.process_group import Group

M, C, INPUTS = 23, 3, 5
STEPS = 6
# Examples of each process in a step, unlabeled and held out; repeated for further steps.
PARTS = {
    2: ([(7, 4), (11, 0), (5, 6)], [(1, 5), (6, 0), (2, 4)]),
    3: ([(4, 0, 7), (1, 10, 0), (3, 4, 4)], [(2, 0, 4), (1, 1, 4), (0, 6, 0)]),
}
Maker = Callable[[Group, bool], Method]
TABLE = {"lr": 0.1, "dtype": torch.float64}
METHODS: dict[str, Maker] = {
    "weights": lambda group, sharded: ExampleWeights(M, process_group=group, sharded=sharded, **TABLE),
    "weights, last of each": lambda group, sharded: ExampleWeights(
        M,
        inverse_hessian="identity",
        duplicates="last",
        read="before",
        interval=2,
        process_group=group,
        sharded=sharded,
        **TABLE,
    ),
    "weights, sgd": lambda group, sharded: ExampleWeights(
        M, optimizer="sgd", process_group=group, sharded=sharded, **TABLE
    ),
    "labels, plain adam": lambda group, sharded: LabelGradientAlignment(
        M, C, optimizer="adam", process_group=group, sharded=sharded, **TABLE
    ),
    "weights, jvp": lambda group, sharded: ExampleWeights(
        M, how="jvp", inverse_hessian="identity", process_group=group, sharded=sharded, **TABLE
    ),
    "labels": lambda group, sharded: LabelGradientAlignment(M, C, process_group=group, sharded=sharded, **TABLE),
    "labels, jvp": lambda group, sharded: LabelGradientAlignment(
        M, C, how="jvp", process_group=group, sharded=sharded, **TABLE
    ),
    "both": lambda group, sharded: ImputeAndWeight(M, process_group=group, sharded=sharded, **TABLE),
}


def batches(seed: int) -> tuple[nn.Sequential, list[dict[str, Tensor]]]:
    draw = Draw(torch.Generator().manual_seed(seed))
    model = nn.Sequential(nn.Linear(INPUTS, 4), nn.Tanh(), nn.Linear(4, C)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(draw.normal(*parameter.shape))
    made = [
        {
            "unlabeled": draw.normal(11, INPUTS),
            "labels": draw.probabilities(11, C),
            "index": torch.randint(M - 2, (11,), generator=draw.generator),
            "holdout": draw.normal(6, INPUTS),
            "targets": draw.classes(6, C),
        }
        for _ in range(STEPS)
    ]
    made[4]["unlabeled"][3, 2] = torch.nan  # one process sees it, and none of them steps
    return model, made


def part_of(batch: dict[str, Tensor], step: int, rank: int, world: int) -> dict[str, Tensor]:
    found = {}
    for name, tensor in batch.items():
        parts = PARTS[world][0 if len(tensor) == 11 else 1]
        found[name] = tensor.split(parts[step % len(parts)])[rank]
    return found


def refine(method: Method, model: nn.Sequential, batch: dict[str, Tensor]) -> list[Tensor]:
    given: dict[str, Any] = {"targets": batch["targets"], "index": batch["index"]}
    given["labels"] = batch["labels"].clone().requires_grad_() * 1
    if method.derivative.how != "last_layer":
        refined = method.refine(model=model, unlabeled=batch["unlabeled"], holdout=batch["holdout"], **given)
    else:
        with fastmeta.capture_features(model) as tape:
            logits_l, logits_u = model(batch["holdout"]), model(batch["unlabeled"])
        refined = method.refine(unlabeled=tape.outputs(logits_u), holdout=tape.outputs(logits_l), **given)
    return [refined.labels, refined.weights]


def train(
    rank: int, seed: int, steps: list[int], states: dict[str, dict[str, Tensor]] | None = None
) -> dict[str, dict[str, Any]]:
    """Steps of every method, with complete tables and with sharded ones, from the states of an earlier run."""
    world = torch.distributed.get_world_size()
    model, joined = batches(seed)
    results: dict[str, dict[str, Any]] = {}
    for name, make in METHODS.items():
        for sharded in (False, True):
            method = copy.deepcopy(make(torch.distributed.group.WORLD, sharded))
            if states is not None:
                method.load_state_dict(states[name])
            rows = [refine(method, model, part_of(joined[step], step, rank, world)) for step in steps]
            table = next(module for module in method.modules() if isinstance(module, MaskedAdamTable))
            results[f"{name}, sharded {sharded}"] = {
                "rows": rows,
                "state": dict(method.state_dict()),
                "kept": len(table.values),
                "buffers": [buffer for buffer, _ in table.named_buffers()],
            }
    return results


def alone(seed: int, steps: list[int], states: dict[str, dict[str, Tensor]] | None = None) -> dict[str, Any]:
    model, joined = batches(seed)
    results = {}
    for name, make in METHODS.items():
        method = make(None, False)
        if states is not None:
            method.load_state_dict(states[name])
        rows = [refine(method, model, joined[step]) for step in steps]
        results[name] = {"rows": rows, "state": dict(method.state_dict())}
    return results


def warned(rank: int) -> list[list[str]]:
    """What a method says in two calls."""
    model, joined = batches(0)
    running = nn.parallel.DistributedDataParallel(model)
    group = torch.distributed.group.WORLD
    given = {"unlabeled": joined[0]["unlabeled"], "holdout": joined[0]["holdout"], "targets": joined[0]["targets"]}
    found = []
    for method in (
        fastmeta.L2I(),
        ExampleWeights(M),
        ExampleWeights(M, process_group=group),
        fastmeta.MetaGradient(synchronize=False),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                method.refine(model=running, index=joined[0]["index"], **given)
        found.append([str(one.message) for one in caught if "process_group" in str(one.message)])
    return found


FIRST, LAST = [0, 1, 2], [3, 4, 5]


@pytest.fixture(scope="module")
def results(module_draw: Draw) -> dict[str, Any]:
    """Of two processes that begin; of three that go on from their state, and that begin; of one."""
    seed = module_draw.integer(0, 2**31)
    two = forked.run_each({"first": (train, seed, FIRST), "warned": (warned,)})
    states = {name: two[0]["first"][f"{name}, sharded True"]["state"] for name in METHODS}
    three = forked.run_each({"first": (train, seed, FIRST), "last": (train, seed, LAST, states)}, 3)
    ended = {name: three[0]["first"][f"{name}, sharded False"]["state"] for name in METHODS}
    return {
        "two": [result["first"] for result in two],
        "three": [result["first"] for result in three],
        "resumed": [result["last"] for result in three],
        "warned": [result["warned"] for result in two],
        "alone": alone(seed, FIRST),
        "alone, last": alone(seed, LAST, alone_state(alone(seed, FIRST))),
        "one from three": alone(seed, LAST, ended),
    }


def alone_state(found: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    return {name: result["state"] for name, result in found.items()}


def close(got: Tensor, expected: Tensor) -> bool:
    if got.shape != expected.shape:
        return False
    return torch.allclose(got.double(), expected.double(), rtol=1e-8, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize(("run", "expected"), [("two", "alone"), ("three", "alone"), ("resumed", "alone, last")])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_the_steps_are_those_on_the_joined_batch(
    results: dict[str, Any], run: str, expected: str, sharded: bool, name: str
) -> None:
    parts = [result[f"{name}, sharded {sharded}"] for result in results[run]]
    whole = results[expected][name]
    for step, rows in enumerate(whole["rows"]):
        for which, tensor in enumerate(rows):
            assert close(torch.cat([part["rows"][step][which] for part in parts]), tensor), step
    assert whole["state"].keys() == parts[0]["state"].keys()
    for key, value in whole["state"].items():
        assert close(parts[0]["state"][key], value), key
        assert all(torch.equal(part["state"][key], parts[0]["state"][key]) for part in parts[1:]), key
    if name in ("weights, sgd", "labels, plain adam"):  # which do not count the steps of a row
        return
    moved = whole["state"]["update.table.steps"]
    assert bool(moved[:-2].any()), "some rows were drawn"
    assert not bool(moved[-2:].any()), "and some were not"


@pytest.mark.parametrize("name", METHODS)
def test_sharding_changes_no_bit(results: dict[str, Any], name: str) -> None:
    for run in ("two", "three"):
        one, other = (results[run][0][f"{name}, sharded {sharded}"] for sharded in (False, True))
        assert all(torch.equal(value, other["state"][key]) for key, value in one["state"].items())
        kept = [result[f"{name}, sharded True"]["kept"] for result in results[run]]
        assert sum(kept) == M
        assert max(kept) - min(kept) <= 1
        assert other["buffers"] == [], "DistributedDataParallel broadcasts buffers"
        assert len(one["buffers"]) == 4


@pytest.mark.parametrize("name", METHODS)
def test_one_process_goes_on_from_a_state_of_three(results: dict[str, Any], name: str) -> None:
    for got, expected in zip(
        results["one from three"][name]["rows"], results["alone, last"][name]["rows"], strict=True
    ):
        assert all(map(close, got, expected))


def test_processes_without_a_group_are_told_once(results: dict[str, Any]) -> None:
    for labels, weights, *quiet in results["warned"]:
        assert quiet == [[], []]
        (of_labels,), (of_weights,) = labels, weights
        assert of_labels.startswith("L2I has no process_group, and 2 processes run: each refines its part of the batch")
        assert "keeps a table of its own" not in of_labels
        assert "by itself and keeps a table of its own; process_group=torch.distributed" in of_weights


def test_sharded_needs_a_group() -> None:
    with pytest.raises(ValueError, match="sharded needs a process_group, got None"):
        ExampleWeights(M, sharded=True)
    with pytest.raises(ValueError, match="sharded must be False for a shared weight"):
        ExampleWeights(M, sharded=True, shared=True)
