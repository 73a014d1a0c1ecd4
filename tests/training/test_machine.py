"""What a machine is told to do changes nothing but rounding, and a step waits for no device."""

import copy
import dataclasses
import functools
from typing import Any

import pytest
import torch
from device_tensors import Tape, no_wait, on_device, pretends_a_gpu
from small_trainers import CASES, CLASSES, trainer
from torch import Tensor, nn

import fastmeta
from fastmeta.ops.solve import conjugate_gradient as solver
from fastmeta.problem.random_state import RandomState
from fastmeta.ssl import MixUpConsistency, ReMixMatch, TrainingBatch
from fastmeta.training import machine as machine_module
from fastmeta.training.config import MachineConfig
from fastmeta.training.machine import capture_steps, refuse_compile, refuse_synchronized
from fastmeta.training.processes import Processes
from fastmeta.training.recipes import METHODS
from fastmeta.training.trainer import Trainer

LAST_LAYER = [name for name, recipe in METHODS.items() if recipe.make is not None and recipe.passes == "shared"]


def batch_on_device(batch: TrainingBatch) -> TrainingBatch:
    """Without keys, from which NumPy draws on a CPU."""
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch) if "keys" not in field.name}
    return TrainingBatch(**{name: on_device(value) for name, value in fields.items()})


def as_on_a_gpu(run: Trainer) -> Trainer:
    """Its batches are those of a device, and so is the method's table."""
    batches = [batch_on_device(run.batches(number)) for number in range(5)]
    run.batches = lambda number: batches[number]
    table = None if run.method is None else getattr(run.method.method.update, "table", None)
    for name in () if table is None else ("values", "exp_avg", "exp_avg_sq", "steps"):
        setattr(table, name, on_device(getattr(table, name)))
    return run


@pretends_a_gpu
@pytest.mark.parametrize(("base", "method"), CASES)
def test_a_step_waits_for_no_device(base: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An iterative solver looks how far it is every few iterations, but not inside a CUDA graph."""
    monkeypatch.setattr(solver, "capturing", lambda tensor: True)
    monkeypatch.setattr(RandomState, "is_current", lambda self: True)  # compares states that the host has
    run = as_on_a_gpu(trainer(base, method, None, MachineConfig(), normalized=True, tol=1e-3))
    run.train_step()
    with no_wait():
        run.train_step()
    with pytest.raises(AssertionError, match="waits for the device"), no_wait():
        run.step_averages.read()


@pretends_a_gpu
@pytest.mark.parametrize("method", LAST_LAYER)
def test_steps_of_a_captured_method(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tape = Tape()
    monkeypatch.setattr(solver, "capturing", lambda tensor: tape.recording)
    monkeypatch.setattr(machine_module, "graph", functools.partial(fastmeta.graph, recorder=tape))
    monkeypatch.setattr(MachineConfig, "check", lambda self: None)  # which refuses it on the CPU
    machine = MachineConfig(graph=True)
    if "scheduled" in METHODS[method].settings:
        with pytest.raises(ValueError, match=r"machine.graph must be False with a method whose step changes at every"):
            trainer("fixmatch", method, None, machine)
        return
    found = []
    for given in (MachineConfig(), machine):
        run = as_on_a_gpu(trainer("fixmatch", method, None, given, tol=1e-3))
        for _ in range(4):
            run.train_step()
        found.append({**run.model.state_dict(), "change": run.label_changes.change})
    assert tape.recorded == 1
    assert tape.replayed == 3
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-6, atol=1e-9)


def trained(base: str, method: str, machine: MachineConfig, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "double", lambda module: module)
        run = trainer(base, method, None, machine, normalized=True, tol=1e-5)
    start = copy.deepcopy(list(run.model.parameters()))
    for _ in range(2):
        run.train_step()
    return [after.detach() - before.detach() for before, after in zip(start, run.model.parameters(), strict=True)]


@pytest.mark.parametrize(
    ("base", "method"),
    [("fixmatch", name) for name in METHODS if METHODS[name].settings.get("how") != "jvp"] + [("vat", "none")],
)
def test_bfloat16_and_channels_last(base: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A difference of passes, too, is not lost in the rounding."""
    plain = trained(base, method, MachineConfig(), monkeypatch)
    for machine, tolerance in (
        (MachineConfig(channels_last=True), 1e-3 if base == "vat" else 1e-5),
        (MachineConfig(precision="bfloat16"), 0.05),
    ):
        found = trained(base, method, machine, monkeypatch)
        moved = sum(float(move.square().sum()) for move in plain)
        wrong = sum(float((one - other).square().sum()) for one, other in zip(found, plain, strict=True))
        assert 0 < wrong**0.5 <= tolerance * moved**0.5


def test_a_compiled_model(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # reset leaves what other tests counted
    compiled: list[nn.Module] = []

    def compile_(module: nn.Module) -> None:
        compiled.append(module)
        module._compiled_call_impl = torch.compile(module._call_impl, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", compile_)
    plain, found = (
        trained("fixmatch", "l2i", machine, monkeypatch) for machine in (MachineConfig(), MachineConfig(compile=True))
    )
    assert len(compiled) == 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # nothing is compiled twice
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_what_is_refused() -> None:
    def refiner(name: str) -> Any:
        return METHODS[name].build(10, CLASSES)

    with pytest.raises(ValueError, match=r"machine.compile must be False for mix-up-consistency with a method whose"):
        refuse_compile(MixUpConsistency(), refiner("l2i"))
    refuse_compile(MixUpConsistency(), refiner("meta-gradient"))
    with pytest.raises(ValueError, match=r"machine.compile must be False for remixmatch, unless its rotation"):
        refuse_compile(ReMixMatch(), None)
    refuse_compile(ReMixMatch(rotation_weight=0.0), None)
    for method in (None, refiner("l2i-jvp")):
        with pytest.raises(ValueError, match=r"machine.graph must be False without a method that works on the last"):
            capture_steps(method, Processes())
    with pytest.raises(ValueError, match=r"machine.batch_norm must be per-process for a method with how='jvp'"):
        refuse_synchronized(refiner("l2i-jvp"))
    for name in ("l2i", "meta-gradient-finite-difference"):
        refuse_synchronized(refiner(name))
    with pytest.raises(ValueError, match=r"machine.graph must be False on the CPU"):
        MachineConfig(graph=True).check()
