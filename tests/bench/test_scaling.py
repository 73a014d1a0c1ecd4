"""docs/scaling.md: its formulas against the collectives that methods call, its tables against its formulas."""

import dataclasses
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastmeta
from bench.scaling import cost, memory, page, traffic
from bench.scaling.command import PAGE
from bench.train.task import Task
from fastmeta.training.config import MachineConfig, RunConfig
from fastmeta.training.processes import Processes

C, D, B, M, INPUTS = 3, 5, 7, 40, 6
Counted = list[tuple[str, int]]

TASK = Task(
    "tiny",
    RunConfig(data="generated", labels_per_class=2, model="conv-net", labeled_batch=4, unlabeled_batch=6, steps=9),
    classes=3,
    pixels=8,
)

METHODS: dict[str, Callable[..., fastmeta.Method]] = {
    "MetaGradient": fastmeta.MetaGradient,
    "L2I": fastmeta.L2I,
    "L2I, look-ahead": lambda **given: fastmeta.L2I(look_ahead=True, **given),
    "L2I, look-ahead of 3 steps": lambda **given: fastmeta.L2I(look_ahead=True, steps=3, **given),
    "AlignedImputation": fastmeta.AlignedImputation,
    "ImplicitImputation": lambda **given: fastmeta.ImplicitImputation(solver="cg", **given),
    "ImputeAndWeight": lambda **given: fastmeta.ImputeAndWeight(M, **given),
    "ImputeAndWeight, sharded": lambda **given: fastmeta.ImputeAndWeight(M, sharded=True, **given),
    "ExampleWeights, identity": lambda **given: fastmeta.ExampleWeights(M, inverse_hessian="identity", **given),
    "ExampleWeights": lambda **given: fastmeta.ExampleWeights(M, inverse_hessian="cg", **given),
    "ExampleWeights, sharded": lambda **given: fastmeta.ExampleWeights(M, inverse_hessian="cg", sharded=True, **given),
    "LabelGradientAlignment": lambda **given: fastmeta.LabelGradientAlignment(M, C, **given),
    "LabelGradientAlignment, sharded": lambda **given: fastmeta.LabelGradientAlignment(M, C, sharded=True, **given),
}


def make_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(INPUTS, D), nn.Tanh(), nn.Linear(D, C))


def refine(method: fastmeta.Method, model: nn.Sequential) -> None:
    x_u, x_l, y = torch.randn(B, INPUTS), torch.randn(4, INPUTS), torch.randint(C, (4,))
    given: dict[str, Any] = {"targets": y, "index": torch.randperm(M)[:B]}
    if method.derivative.how == "jvp":
        labels = (2 * model(x_u)).softmax(1)
        method.refine(model=model, unlabeled=x_u, labels=labels, holdout=x_l, **given)
        return
    with fastmeta.capture_features(model) as tape:
        unlabeled, holdout = model(x_u), model(x_l)
        labels = (2 * unlabeled).softmax(1)
        method.refine(unlabeled=tape.outputs(unlabeled), labels=labels, holdout=tape.outputs(holdout), **given)


def iterations(method: fastmeta.Method) -> int:
    """Of the solver that is somewhere in its direction."""
    rules = [rule for rule in method.modules() if isinstance(rule, fastmeta.directions.InverseHessian)]
    return rules[0].last_solution.iterations if rules else 0


def count(rank: int, world: int, folder: Path) -> None:
    """In a process of its own: the collectives of each method and the gradients of DistributedDataParallel."""
    torch.set_num_threads(1)
    meeting = (folder / "meeting").as_uri()
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    seen: Counted = []
    real = {name: getattr(torch.distributed, name) for name in ("all_reduce", "all_gather", "broadcast")}

    def all_reduce(tensor: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        seen.append(("all_reduce", tensor.nbytes))
        return real["all_reduce"](tensor, *arguments, **named)

    def all_gather(into: Any, tensor: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        seen.append(("all_gather", tensor.nbytes))
        return real["all_gather"](into, tensor, *arguments, **named)

    def broadcast(tensor: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        seen.append(("broadcast", tensor.nbytes))
        return real["broadcast"](tensor, *arguments, **named)

    torch.distributed.all_reduce, torch.distributed.all_gather = all_reduce, all_gather
    torch.distributed.broadcast = broadcast
    torch.manual_seed(0)
    model = make_model()
    torch.manual_seed(rank)
    found: dict[str, tuple[Counted, int]] = {}
    for how in ("last_layer", "jvp"):
        for name, make in METHODS.items():
            method = make(how=how, process_group=torch.distributed.group.WORLD)
            for _ in range(2):  # the second step is like any other
                seen.clear()
                refine(method, model)
            found[f"{name}, {how}"] = list(seen), iterations(method)
    trainer = TASK.trainer("none", MachineConfig(), TASK.images(), Processes(torch.distributed.group.WORLD))
    seen.clear()
    trainer.train_step()
    channels = sum(m.num_features for m in trainer.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    found["trainer"] = list(seen), channels
    buckets: Counted = []
    running = DistributedDataParallel(model)

    def hook(state: object, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        buckets.append(("all_reduce", bucket.buffer().nbytes))
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    running.register_comm_hook(None, hook)
    running(torch.randn(B, INPUTS)).sum().backward()
    found["base"] = buckets, 0
    torch.distributed.destroy_process_group()
    torch.save(found, folder / f"result-{rank}")


@pytest.mark.parametrize("world", [2, 3])
def test_the_formulas_are_what_methods_exchange(world, tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=count, args=(rank, world, tmp_path)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * world
    assert METHODS.keys() == traffic.METHODS.keys()
    parameters = sum(tensor.numel() for tensor in make_model().parameters())
    for rank in range(world):
        found = torch.load(tmp_path / f"result-{rank}")
        for key, (seen, made) in found.items():
            setting = traffic.Setting(C, D, parameters, B, world, iterations=made)
            if key == "base":
                calls = traffic.base_step(setting)
            elif key == "trainer":
                assert made > 0
                calls = traffic.trainer_step(dataclasses.replace(setting, channels=made))
            else:
                name, how = key.rsplit(", ", 1)
                calls = traffic.METHODS[name](setting, setting.model if how == "jvp" else setting.last_layer)
            assert sorted((call.kind, call.size) for call in calls) == sorted(seen), key


def test_buckets_hold_all_gradients():
    setting = page.IMAGENET.setting
    sizes = [call.size for call in traffic.base_step(setting)]
    assert sum(sizes) == 4 * setting.parameters
    assert sizes[0] == 2**20
    assert max(sizes) == 25 * 2**20


def test_memory_is_that_of_the_table():
    for columns, method in ((C, fastmeta.LabelGradientAlignment(M, C)), (1, fastmeta.ExampleWeights(M))):
        state = method.update.table.state_dict()
        held = sum(state[name].nbytes for name in ("values", "exp_avg", "exp_avg_sq", "steps"))
        assert memory.table(M, columns) == held
    assert memory.table(10, 1, 4) == 3 * 16


def test_the_model_against_published_times():
    """nccl-tests issue 290: two nodes of eight H100 that reach 155 GB/s; bytes and us."""
    cluster = cost.Cluster("measured", nvlink=370, network=155)
    for size, measured in ((8_388_608, 215), (16_777_216, 263), (33_554_432, 439), (134_217_728, 1576), (2**30, 13435)):
        modeled = 1e6 * cluster.seconds(traffic.Collective("all_reduce", size), 16)
        assert 0.75 < modeled / measured < 1.25


def test_more_processes_cost_no_less():
    for kind in ("all_reduce", "all_gather", "broadcast"):
        for size in (8, 10**6, 10**9):
            call = traffic.Collective(kind, size)
            seconds = [cost.NDR.seconds(call, processes) for processes in (1, 8, 64, 512)]
            assert seconds == sorted(seconds)
            assert seconds[0] == 0
            assert seconds[-1] >= call.sent(512) / (cost.NDR.nvlink * 1e9)


def test_the_page_has_the_tables_of_today():
    text = PAGE.read_text()
    assert page.filled(text) == text, "run python -m bench scaling --write"
