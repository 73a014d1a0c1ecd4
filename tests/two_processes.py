"""Runs a function in processes that share a group, two if not said otherwise: gloo, on the CPU, one thread each."""

import datetime
import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed

WORLD_SIZE = 2
TIME_LIMIT = 300.0  # s


def run(calls: dict[str, tuple[Any, ...]], world_size: int = WORLD_SIZE) -> list[dict[str, Any]]:
    """What each ``function(rank, *arguments)`` returns in each process, in the order of their ranks.

    A start takes some seconds: let it do many checks. The processes meet at a file of their own, so any number of
    these may run at a time.

    Args:
        calls: ``(function, *arguments)`` by a name; functions at the top level of a test module, arguments
            that ``torch.save`` takes.
        world_size: number of processes.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(
            {key: (_place(function), arguments) for key, (function, *arguments) in calls.items()}, folder / "calls"
        )
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        processes = []
        try:
            for rank in range(world_size):
                with open(folder / f"output-{rank}", "w") as output:
                    command = [sys.executable, "-X", "faulthandler", __file__, name, str(rank), str(world_size)]
                    processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
            codes = [process.wait(TIME_LIMIT) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        said = [(folder / f"output-{rank}").read_text()[-5000:] for rank in range(world_size)]
        assert not any(codes), "\n".join(f"process {rank} ({codes[rank]}):\n{said[rank]}" for rank in range(world_size))
        return [torch.load(folder / f"result-{rank}", weights_only=False) for rank in range(world_size)]


def _place(function: Callable[..., Any]) -> tuple[str, str]:
    return function.__code__.co_filename, function.__name__


def _main(folder: Path, rank: int, world_size: int) -> None:
    torch.set_num_threads(1)
    calls = torch.load(folder / "calls", weights_only=False)
    torch.distributed.init_process_group(
        "gloo",
        init_method=(folder / "meeting").as_uri(),
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=60),
    )
    results = {}
    for key, ((file, name), arguments) in calls.items():
        sys.path.insert(0, str(Path(file).parent))
        results[key] = getattr(importlib.import_module(Path(file).stem), name)(rank, *arguments)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    torch.save(results, folder / f"result-{rank}")


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
