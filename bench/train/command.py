"""Images a second of the trainer with each method, and what a step is made of.

Waiting for images, augmentation, forward, the method, backward, optimizer, average of the weights. All methods of a
task take their steps in turn, in one process and in several that share each batch. Images are generated and in memory:
nothing is decoded. Writes train.json and train.md.
"""

import argparse
import dataclasses
import multiprocessing
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from bench import environment, files
from bench.operators import RESULTS
from bench.rows import Row, warn_if_contended
from bench.text import one_line
from bench.train import report
from bench.train.measure import measure
from bench.train.task import DEFAULT_METHODS, TASKS, Task
from fastmeta.training.config import MachineConfig
from fastmeta.training.processes import Processes

START = "spawn"  # of the processes that share a batch
TIMEOUT = 1800.0  # s


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--methods", nargs="+", choices=DEFAULT_METHODS, help="beside the base alone")
    parser.add_argument("--tasks", nargs="+", metavar="TEXT", help="tasks whose name contains this")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2], help="numbers of processes (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="steps of each method (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads, of all processes (%(default)s)")
    parser.add_argument("--device", choices=list(TASKS), default="cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile of everything below the last layer")
    parser.add_argument("--out", type=Path, help="folder for the results (bench/results/<processor and threads>)")


def run(options: argparse.Namespace) -> int:
    on_gpu = options.device == "cuda"
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.benchmark = on_gpu
    machine = MachineConfig(
        device=options.device,
        precision="bfloat16" if on_gpu else "float32",
        channels_last=on_gpu,
        compile=options.compile,
    )
    wanted = options.tasks or [""]
    tasks = [task for task in TASKS[options.device] if any(text in task.name for text in wanted)]
    if not tasks:
        print("No task has such a name.", file=sys.stderr)
        return 2
    if options.methods is not None:
        kept = ("none", *options.methods)
        tasks = [dataclasses.replace(t, methods=tuple(m for m in t.methods if m in kept)) for t in tasks]
    start = time.monotonic()
    folder = options.out or RESULTS / environment.machine_name()
    rows: list[Row] = []
    left_out: list[str] = []
    for task in tasks:
        for count in options.processes:
            if on_gpu and count > torch.cuda.device_count():
                left_out.append(f"{count} processes: {torch.cuda.device_count()} GPUs")
                continue
            print(f"{task.name}: {len(task.methods)} methods, processes: {count} ...", flush=True)
            try:
                rows += in_processes(task, machine, options.rounds, count, max(1, options.threads // count))
            except Exception as error:  # one task must not end the run: a card too small for it, say
                traceback.print_exc()
                left_out.append(f"{task.name}, processes: {count}: {one_line(repr(error))}")
            results: Row = {
                "schema_version": report.SCHEMA_VERSION,
                "environment": environment.describe(),
                "settings": {**dataclasses.asdict(machine), "rounds": options.rounds, "threads": options.threads},
                "rows": rows,
                "left_out": sorted(set(left_out)),
                "seconds": time.monotonic() - start,
            }
            files.write(folder / "train.json", results)
            (folder / "train.md").write_text(report.markdown(results))
    print("\n".join([*report.tables(rows), f"{time.monotonic() - start:.0f} s; train.json, train.md in {folder}"]))
    for line in left_out:
        print(f"Not measured: {line}", file=sys.stderr)
    if rows:
        warn_if_contended(rows)
    return 0 if rows else 1


def in_processes(task: Task, machine: MachineConfig, rounds: int, count: int, threads: int) -> list[Row]:
    """The rows of :func:`measure`, from the first of ``count`` processes; one is this process."""
    if count == 1:
        torch.set_num_threads(threads)
        return measure(task, machine, rounds)
    context: Any = multiprocessing.get_context(START)
    with tempfile.TemporaryDirectory() as name:
        members = [(rank, count, Path(name), task, machine, rounds, threads) for rank in range(count)]
        processes = [context.Process(target=_member, args=member) for member in members]
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join(TIMEOUT)
        finally:
            for process in processes:
                process.kill()
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"processes ended with {[process.exitcode for process in processes]}")
        return files.read(Path(name) / "rows.json")


def _member(rank: int, count: int, folder: Path, task: Task, machine: MachineConfig, rounds: int, threads: int) -> None:
    torch.set_num_threads(threads)
    on_gpu = machine.device == "cuda"
    if on_gpu:
        torch.cuda.set_device(rank)
    meeting = (folder / "meeting").as_uri()
    backend = "nccl" if on_gpu else "gloo"
    torch.distributed.init_process_group(backend, init_method=meeting, rank=rank, world_size=count)
    rows = measure(task, machine, rounds, Processes(torch.distributed.group.WORLD))
    torch.distributed.destroy_process_group()
    if rank == 0:
        files.write(folder / "rows.json", rows)
