"""Runs a function in forked processes that share a group: gloo, on the CPU. They start at once, imports and all."""

import datetime
import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed

TIME_LIMIT = 300.0  # s


def run(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """What ``function(group, *arguments)`` returns in each process, in the order of their ranks."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = (folder, world_size, function, arguments)
        processes = [context.Process(target=_main, args=(rank, *given)) for rank in range(world_size)]
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join(TIME_LIMIT)
            codes = [process.exitcode for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.join()
        assert not any(code is None or code for code in codes), f"exit codes {codes}; what they said is above"
        return [torch.load(folder / f"result-{rank}", weights_only=False) for rank in range(world_size)]


def run_each(calls: dict[str, tuple[Any, ...]], world_size: int = 2) -> list[dict[str, Any]]:
    """What each ``function(rank, *arguments)`` returns in each process; ``(function, *arguments)`` by a name."""
    return run(_each, world_size, calls)


def _each(group: Any, calls: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    return {name: function(group.rank(), *arguments) for name, (function, *arguments) in calls.items()}


def _main(rank: int, folder: Path, world_size: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=(folder / "meeting").as_uri(),
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=60),
    )
    result = function(torch.distributed.group.WORLD, *arguments)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    torch.save(result, folder / f"result-{rank}")
