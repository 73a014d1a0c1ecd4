"""Training on 2, 3 and 4 processes, whose batches do not divide evenly, is that of one process on the same batches.

In float64, so that what is left is rounding; without batch statistics, which are each process's own.
"""

import copy
import dataclasses
import importlib
import shutil
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from short_runs import assert_same_run, small, tensors
from small_trainers import CASES, SIZES, STEPS, data, trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastmeta.data import Images
from fastmeta.methods import l2i
from fastmeta.models import build_model
from fastmeta.ops.process_group import Group
from fastmeta.training import RunConfig, train
from fastmeta.training.batches import Batches
from fastmeta.training.config import AverageConfig, EvaluationConfig, MachineConfig
from fastmeta.training.ema import ExponentialMovingAverage
from fastmeta.training.evaluation import Evaluator
from fastmeta.training.files import read_jsonl
from fastmeta.training.label_changes import LabelChanges
from fastmeta.training.machine import refuse_sharding
from fastmeta.training.processes import Processes
from fastmeta.training.recipes import METHODS
from fastmeta.training.shards import whole_state
from fastmeta.training.trainer import Trainer

WORLDS = (2, 3, 4)
UNUSED = [("fixmatch", "l2i"), ("vat", "none"), ("mean-teacher", "none")]
ON_FOUR = [
    ("fixmatch", method)
    for method in ("none", "l2i", "example-weights", "label-gradient-alignment", "l2i-alternating", "l2i-jvp")
] + [("fixmatch", "label-gradient-alignment-published")]
PARTS = 2  # of a step, of three labeled images each
SHARDED = [case for case in CASES if METHODS[case[1]].passes == "shared" and "published" not in case[1]]
# Methods whose passes are differences.
DIFFERENCES = [("fixmatch", "meta-gradient-finite-difference"), ("fixmatch", "meta-gradient-published")]
IN_PARTS = {"parts": "l2i", "differences in parts": "meta-gradient-finite-difference"}
# Loops of the papers other than the recipes'.
LOOPS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "fresh batches": ("fixmatch", "example-weights-published", {"fresh": True, "interval": 2}),
    "V1, means": ("mean-teacher", "l2i-published", dataclasses.asdict(l2i.preset("official_code", "V1"))),
    "V1, sums": ("mean-teacher", "l2i-published", dataclasses.asdict(l2i.preset("paper", "V1"))),
}
RESUMED = [("fixmatch", "l2i"), ("fixmatch", "example-weights"), ("vat", "label-gradient-alignment")]


def trained(group: Group, base: str, method: str, machine: MachineConfig | None = None) -> dict[str, Any]:
    """What a run of some steps leaves."""
    run = trainer(base, method, group, machine)
    for _ in range(STEPS):
        run.train_step()
    averages = run.step_averages.read()
    return comparable(run, averages)


def comparable(run: Trainer, averages: dict[str, float]) -> dict[str, Any]:
    state = {**run.state_dict(), "averages": averages}
    if run.method is not None:
        state["method"].pop("direction.solver.numbers", None)  # iterations, and how well it went
    return state


def all_cases(group: Group) -> dict[str, Any]:
    cases = CASES if group is None or group.size() < 4 else ON_FOUR
    return {f"{base} + {method}": trained(group, base, method) for base, method in cases}


def assert_alike(found: Any, wanted: Any, name: str) -> None:
    if isinstance(wanted, Tensor):
        assert found.shape == wanted.shape, name
        tolerance = 1e-10 if wanted.dtype == torch.float64 else 1e-6
        difference = float((found.double() - wanted.double()).abs().max()) if wanted.numel() else 0.0
        assert difference <= tolerance * max(1.0, float(wanted.double().abs().max() if wanted.numel() else 0)), (
            f"{name}: {difference:.1e}"
        )
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), name
        for key, value in wanted.items():
            assert_alike(found[key], value, f"{name}, {key}")
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted), name
        for place, value in enumerate(wanted):
            assert_alike(found[place], value, f"{name}, {place}")
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, abs=1e-6), name
    else:
        assert found == wanted, name


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    found = all_cases(None)
    for base in ("fixmatch", "pseudo-label"):
        assert 0.1 < found[f"{base} + l2i"]["averages"]["confident"] < 0.9  # or there is little to compare
    return found


@pytest.mark.parametrize("world", WORLDS)
def test_every_method_on_processes_is_that_of_one(alone: dict[str, Any], world: int) -> None:
    wrong = []
    for rank, found in enumerate(forked.run(all_cases, world)):
        assert len(found) == (len(CASES) if world < 4 else len(ON_FOUR))
        for name, state in found.items():
            try:
                assert_alike(state, alone[name], f"process {rank}, {name}")
            except AssertionError as error:
                wrong.append(str(error))
    assert not wrong, "\n".join(wrong)


def loops(group: Group) -> dict[str, Any]:
    found = {}
    for name, (base, method, settings) in LOOPS.items():
        run = trainer(base, method, group, method_settings=settings, holdout_batch=5)
        run.train_step()
        state = run.state_dict()  # the second half is that of a resumed run
        run = trainer(base, method, group, method_settings=settings, holdout_batch=5)
        run.load_state_dict(copy.deepcopy(state))
        run.train_step()
        found[name] = comparable(run, run.step_averages.read())
    return found


def continued(group: Group, saved: dict[str, Any]) -> dict[str, Any]:
    """The second half of runs whose first half others had."""
    found = {}
    for (base, method), state in saved.items():
        run = trainer(base, method, group)
        run.load_state_dict(copy.deepcopy(state))  # whose tensors an optimizer takes as they are
        run.train_step()
        averages = run.step_averages.read()
        found[f"{base} + {method}"] = comparable(run, averages)
    return found


def with_statistics(group: Group) -> dict[str, Any]:
    """A net with batch normalization, whose statistics are each process's own until all need the same."""
    run = trainer("mean-teacher", "l2i", group, normalized=True)
    for _ in range(STEPS):
        run.train_step()
    own = run.model.body[1].running_mean.clone()
    evaluator = Evaluator(EvaluationConfig(), run.data.images, run.data.split, run.data.views, processes=run.processes)
    run.synchronize()
    figures = evaluator(STEPS, run.model, run.average.model)
    confusion = evaluator.confusion(run.model, "test")
    return {"own": own, "state": run.state_dict(), "figures": figures, "confusion": confusion}


def updated(run: Trainer) -> dict[str, Tensor]:
    for _ in range(STEPS):
        run.train_step()
    return run.model.state_dict()


def several(group: Group) -> dict[str, Any]:
    """First halves of runs; steps in parts; running statistics."""
    first = {}
    for base, method in RESUMED:
        run = trainer(base, method, group)
        run.train_step()
        first[base, method] = run.state_dict()
    machine = MachineConfig(accumulation=PARTS)
    parts = {method: trained(group, "fixmatch", method, machine) for method in ("none", "example-weights")}
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(2)), group)
    average = ExponentialMovingAverage(synchronized, AverageConfig()).model
    return {
        "first": first,
        "parts": parts,
        "statistics": with_statistics(group),
        "unused": [updated(trainer(*case, group, unused=True)) for case in UNUSED],
        "same group": average[0].process_group is group,
        "loops": loops(group),
    }


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return forked.run(several, 2)


def test_a_run_goes_on_with_another_number_of_processes(alone: dict[str, Any], two: list[dict[str, Any]]) -> None:
    assert_alike(two[1]["first"], two[0]["first"], "first half")
    found = [continued(None, two[0]["first"]), *forked.run(continued, 3, two[0]["first"])]
    for part in found:
        for name, state in part.items():
            assert_alike(state, alone[name], name)


def test_a_step_in_parts(two: list[dict[str, Any]]) -> None:
    machine = MachineConfig(accumulation=PARTS)
    for method in ("none", "example-weights"):
        wanted = trained(None, "fixmatch", method, machine)
        for part in two:
            assert_alike(part["parts"][method], wanted, method)


def test_the_papers_loops(two: list[dict[str, Any]]) -> None:
    wanted = loops(None)
    assert bool((wanted["fresh batches"]["method"]["update.table.values"] != 1).any())
    for part in two:
        for name, state in part["loops"].items():
            assert_alike(state, wanted[name], name)


def test_parameters_that_no_forward_uses(two: list[dict[str, Any]]) -> None:
    for number, case in enumerate(UNUSED):
        wanted = updated(trainer(*case, None, unused=True))
        for part in two:
            assert_alike(part["unused"][number], wanted, f"{case}")


def test_an_average_of_synchronized_statistics(two: list[dict[str, Any]]) -> None:
    """A group cannot be copied; a forward pass would need a GPU."""
    assert [part["same group"] for part in two] == [True, True]


def test_running_statistics_and_errors_are_the_same_on_all(two: list[dict[str, Any]]) -> None:
    first, second = (part["statistics"] for part in two)
    assert not first["own"].equal(second["own"])
    assert_alike(second["state"], first["state"], "state")
    assert first["state"]["model"]["body.1.running_mean"].equal(first["own"])
    run = trainer("mean-teacher", "l2i", None, normalized=True)
    run.load_state_dict(first["state"])
    evaluator = Evaluator(EvaluationConfig(), run.data.images, run.data.split, run.data.views)
    figures = evaluator(STEPS, run.model, run.average.model)
    assert 0 < figures["test_error_student"] < 1
    assert first["figures"] == second["figures"] == figures
    assert first["confusion"].equal(evaluator.confusion(run.model, "test"))
    assert first["confusion"].sum() == SIZES["test"]


def test_more_processes_than_images() -> None:
    class Five:
        rank, count, group = 0, 8, None

    with pytest.raises(ValueError, match="labeled_batch must be at least the number of processes, 8, got 6"):
        Batches(data(6), second_view=None, seed=0, machine=MachineConfig(), processes=Five())
    with pytest.raises(ValueError, match="processes must be at most the number of hold-out images, 7, got 8"):
        Batches(data(6), second_view=None, holdout="part", seed=0, machine=MachineConfig(), processes=Five())


def test_an_example_that_is_twice_in_a_batch() -> None:
    changes = LabelChanges(3)
    before = torch.tensor([[1.0, 0.0]]).expand(5, 2)
    moves = torch.tensor([0.1, 0.4, 0.4, 0.2, 0.3]).unsqueeze(1) * torch.tensor([-1.0, 1.0])
    changes.add(1, torch.tensor([2, 0, 2, 0, 2]), before, before + moves)
    assert changes.change.tolist() == pytest.approx([0.8, 0.0, 0.8])
    assert changes.values[:, 4].tolist() == pytest.approx([0.6, 0.0, 0.6])


def sharded(group: Group, cases: list[tuple[str, str]]) -> dict[str, Any]:
    """Runs whose weights are spread over the processes."""
    found: dict[str, Any] = {}
    for base, method in cases:
        run = trainer(base, method, group, MachineConfig(sharding="fsdp2"))
        found[f"{base} + {method}"] = whole(run)
    for name, method in IN_PARTS.items():
        run = trainer("fixmatch", method, group, MachineConfig(sharding="fsdp2", accumulation=PARTS))
        found[name] = whole(run)
    return found


def whole(run: Trainer) -> dict[str, Any]:
    for _ in range(STEPS):
        run.train_step()
    averages = run.step_averages.read()
    state = comparable(run, averages)
    model, average = whole_state(run.model), whole_state(run.average.model)
    moments = [entry["momentum_buffer"] for entry in state["optimizer"]["state"].values()]
    spread = sum(isinstance(moment, DTensor) for moment in moments)
    moments = [moment.full_tensor() if isinstance(moment, DTensor) else moment for moment in moments]
    kept = {name: state[name] for name in ("step", "method", "label_changes", "averages", "skipped")}
    return {"state": kept, "model": model, "average": average, "moments": moments, "spread": spread}


@pytest.mark.parametrize("world", [2, 3])
def test_sharded_weights(alone: dict[str, Any], world: int) -> None:
    cases = (SHARDED if world == 2 else SHARDED[:2]) + DIFFERENCES
    parts = forked.run(sharded, world, cases)
    expected = {" + ".join(case): alone[" + ".join(case)] for case in cases}
    for name, method in IN_PARTS.items():
        expected[name] = trained(None, "fixmatch", method, MachineConfig(accumulation=PARTS))
    for name, wanted in expected.items():
        found = [part[name] for part in parts]
        for part in found:
            assert_alike(part["state"], {key: wanted[key] for key in part["state"]}, name)
            moments = [entry["momentum_buffer"] for entry in wanted["optimizer"]["state"].values()]
            assert_alike(part["moments"], moments, name)
            assert part["spread"] == 6  # of eight: the head is whole
        assert_alike(found[0]["model"], wanted["model"], name)
        assert_alike(found[0]["average"], wanted["average"]["model"], name)
        assert not found[1]["model"]


def run_of(group: Group, digits: Images, folder: Path, stop: int | None) -> bool:
    """Whether it came to its end."""
    importlib.import_module("fastmeta.training.train").write_report = lambda *arguments: None  # in this process alone
    config = RunConfig(method="l2i", **small(sharding="fsdp2"))
    steps: list[int] = []
    results = train(
        config,
        folder,
        images=digits,
        processes=Processes(group),
        on_step=steps.append,
        should_stop=lambda: stop is not None and len(steps) > stop,
    )
    return results is not None


def sharded_runs(group: Group, digits: Images, folder: Path) -> None:
    """One from end to end, and one that is stopped and goes on; what it goes on from is kept."""
    assert run_of(group, digits, folder / "whole", None)
    assert not run_of(group, digits, folder / "same", 5)
    if group.rank() == 0:
        shutil.copytree(folder / "same", folder / "more")
    torch.distributed.barrier()
    assert run_of(group, digits, folder / "same", None)


def test_a_sharded_run_is_stopped_and_goes_on(digits: Images, tmp_path: Path) -> None:
    """As one that was not, on two processes; on three, too."""
    forked.run(sharded_runs, 2, digits, tmp_path)
    assert [path.is_dir() for path in (tmp_path / "more" / "checkpoints").iterdir()] == [True, True]
    assert all(forked.run(run_of, 3, digits, tmp_path / "more", None))
    assert_same_run(tmp_path / "whole", tmp_path / "same")
    build_model("conv-net", num_classes=10, channels=1, image_size=8).load_state_dict(tensors(tmp_path / "more"))
    assert len(read_jsonl(tmp_path / "more" / "metrics.jsonl")) == 3


def test_what_cannot_be_sharded() -> None:
    machine = MachineConfig(sharding="fsdp2")
    with pytest.raises(ValueError, match=r"machine.sharding must be none on one process, got 'fsdp2'"):
        trainer("fixmatch", "l2i", None, machine)
    refiner = METHODS["l2i-jvp"].build(9, 3)
    several = Processes(object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"a method that makes passes of its own \(how='jvp'\)"):
        refuse_sharding(refiner, machine, several)
    with pytest.raises(ValueError, match="must be none with a method that has an update of its own, got 'fsdp2'"):
        refuse_sharding(METHODS["l2i-alternating"].build(9, 3), machine, several)
    for name in ("compile", "channels_last"):
        with pytest.raises(ValueError, match=f"machine.sharding must be none with machine.{name}"):
            refuse_sharding(None, MachineConfig(sharding="fsdp2", **{name: True}), several)
    refuse_sharding(None, machine, several)
